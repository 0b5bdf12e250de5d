"""Each answer over real HTTP, decoded by slow means and compared with what the model gives in this process."""

import io
import json
from itertools import pairwise
from urllib.parse import unquote

import httpx
import numpy as np
import pytest
from PIL import Image

from export.bundle import bundle
from export.runtime import geojson, runtime
from pipeline.imaging import decode, label_maps
from serving.http import responses
from tests.support import tiny_onnx
from tests.support.image_files import save
from tests.support.live_server import Server, error
from tests.support.synthetic_masks import fill

PALETTE = [tuple(item["color"]) for item in tiny_onnx.CLASSES]
RAW = {"Content-Type": "application/octet-stream"}


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Ragged regions of every class with specks: smooth colours and noise."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(smooth).astype(int) + rng.integers(-40, 41, (height, width, 3)), 0, 255).astype(np.uint8)


PHOTO = save(Image.fromarray(picture(61, 97, 0)))


@pytest.fixture(scope="module")
def found(server: Server) -> runtime.Segmentation:
    opened = bundle.open_bundle(server.folder / "champions/first/bundle")
    here = runtime.Runtime(opened, provider="cpu", threads=1)
    return here.segment(decode.decode(PHOTO, max_pixels=10**6))


def ask(http: httpx.Client, view: str, **query: object) -> httpx.Response:
    response = http.post("/v1/segment", params={"view": view} | query, content=PHOTO, headers=RAW)
    assert response.status_code == 200, response.text
    return response


def narrowed(found: runtime.Segmentation, keep: set[int], floor: float) -> np.ndarray:
    want = found.label_HW.copy()
    for y, x in np.ndindex(*want.shape):
        if want[y, x] not in keep or found.confidence_HW[y, x] / 255 < floor:
            want[y, x] = 255
    return want


def pixels(response: httpx.Response) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(response.content)))


def from_counts(text: str, height: int, width: int) -> np.ndarray:
    """COCO's compressed run lengths by the letter of their definition, one character and one pixel at a time."""
    runs: list[int] = []
    at = 0
    while at < len(text):
        value, shift, more = 0, 0, True
        while more:
            five = ord(text[at]) - 48
            value |= (five & 31) << shift
            more, shift, at = bool(five & 32), shift + 5, at + 1
            if not more and five & 16:
                value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    mask, pixel, inside = np.zeros((height, width), bool), 0, False
    for run in runs:
        for _ in range(run):
            mask[pixel % height, pixel // height] = inside
            pixel += 1
        inside = not inside
    assert pixel == height * width
    return mask


FILTERS = [
    ({}, {0, 1, 2, 3}, 0.0),
    ({"classes": "red,3"}, {1, 3}, 0.0),
    ({"min_confidence": "0.6"}, {0, 1, 2, 3}, 0.6),
    ({"classes": " blue , dark", "min_confidence": 0.25}, {0, 3}, 0.25),
    ({"min_confidence": "1"}, {0, 1, 2, 3}, 1.0),
]


@pytest.mark.parametrize(("query", "keep", "floor"), FILTERS)
def test_filters_change_every_answer(
    http: httpx.Client, found: runtime.Segmentation, query: dict, keep: set[int], floor: float
) -> None:
    want = narrowed(found, keep, floor)
    image_HWC = picture(61, 97, 0)
    mask = ask(http, "mask", **query)
    np.testing.assert_array_equal(pixels(mask), want)
    assert mask.content == label_maps.encode_png(want, PALETTE)
    np.testing.assert_array_equal(
        pixels(ask(http, "overlay", **query)), label_maps.overlay(image_HWC, want, PALETTE, 0.5)
    )
    np.testing.assert_array_equal(pixels(ask(http, "confidence", **query)), found.confidence_HW)  # shows every pixel
    facts = responses.SegmentAnswer.model_validate_json(ask(http, "json", **query).content, strict=True)
    assert facts.ignored == (want == 255).sum()
    for item in facts.classes:
        np.testing.assert_array_equal(from_counts(item.rle.counts, 61, 97), want == item.id)
        assert item.pixels == (want == item.id).sum()
    shape = geojson.FeatureCollection.model_validate_json(
        ask(http, "geojson", tolerance=0, **query).content, strict=True
    )
    drawn = np.full((61, 97), 255, np.uint8)
    for feature in shape.features:
        part = fill([np.array(ring) for ring in feature.geometry.coordinates], 61, 97)
        assert (drawn[part] == 255).all()
        drawn[part] = feature.properties.id
        facts_of = feature.properties
        assert facts_of.pixels == part.sum()
        assert facts_of.confidence == pytest.approx(found.confidence_HW[part].mean() / 255, abs=5e-5)
        named = {"id": facts_of.id, "name": facts_of.name, "color": list(facts_of.color)}
        assert named == tiny_onnx.CLASSES[facts_of.id]
    np.testing.assert_array_equal(drawn, want)


@pytest.mark.parametrize(("query", "keep", "floor"), FILTERS)
def test_headers_say_what_was_asked_for(
    http: httpx.Client, found: runtime.Segmentation, query: dict, keep: set[int], floor: float
) -> None:
    label, sure = found.scaled_label_hw, found.scaled_confidence_hw
    kept = np.isin(label, list(keep)) & (sure / 255 >= floor)
    want = {c["name"]: round(float(((label == c["id"]) & kept).mean()), 4) for c in tiny_onnx.CLASSES}
    for view in ("mask", "json", "geojson", "overlay", "confidence"):
        headers = ask(http, view, **query).headers
        pairs = [part.split("=") for part in headers["x-class-areas"].split(", ") if part]
        assert {unquote(name): float(share) for name, share in pairs} == {n: s for n, s in want.items() if s}
        assert float(headers["x-confidence"]) == pytest.approx(sure[kept].mean() / 255 if kept.any() else 0, abs=5e-5)


@pytest.mark.parametrize(
    ("size", "shape"), [("image", (61, 97)), ("model", (40, 64)), ("33x120", (120, 33)), ("1x1", (1, 1))]
)
def test_sizes(http: httpx.Client, found: runtime.Segmentation, size: str, shape: tuple[int, int]) -> None:
    def nearest(values: np.ndarray) -> np.ndarray:
        if size == "model":
            return found.scaled_label_hw if values is found.label_HW else found.scaled_confidence_hw
        rows = [int((y + 0.5) * values.shape[0] / shape[0]) for y in range(shape[0])]
        columns = [int((x + 0.5) * values.shape[1] / shape[1]) for x in range(shape[1])]
        return np.array([[values[y, x] for x in columns] for y in rows])

    label, sure = nearest(found.label_HW), nearest(found.confidence_HW)
    assert label.shape == shape
    np.testing.assert_array_equal(pixels(ask(http, "mask", size=size)), label)
    np.testing.assert_array_equal(pixels(ask(http, "confidence", size=size)), sure)
    floored = ask(http, "mask", size=size, min_confidence=0.6)
    np.testing.assert_array_equal(pixels(floored), np.where(sure / 255 < 0.6, 255, label))
    facts = ask(http, "json", size=size).json()
    assert (facts["height"], facts["width"], sum(c["pixels"] for c in facts["classes"])) == (*shape, label.size)
    shape_facts = ask(http, "geojson", size=size, tolerance=0).json()
    assert (shape_facts["height"], shape_facts["width"]) == shape
    assert sum(f["properties"]["pixels"] for f in shape_facts["features"]) == label.size
    scaled = Image.fromarray(picture(61, 97, 0)).resize(shape[::-1], Image.Resampling.BILINEAR)
    shown = pixels(ask(http, "overlay", size=size))
    np.testing.assert_array_equal(shown, label_maps.overlay(np.asarray(scaled), label, PALETTE, 0.5))


def test_polygons_get_simpler_and_stay_near(http: httpx.Client, found: runtime.Segmentation) -> None:
    pytest.importorskip("shapely")

    def points(**query: object) -> int:
        shape = ask(http, "geojson", **query).json()
        return sum(len(ring) for f in shape["features"] for ring in f["geometry"]["coordinates"])

    exact, usual, one, rough = points(tolerance=0), points(), points(tolerance=1), points(tolerance=5)
    assert exact > usual == one > rough > 0
    response = ask(http, "geojson")
    assert response.headers["content-type"] == "application/geo+json"
    assert response.headers["vary"] == "Accept"
    assert (
        http.post("/v1/segment", content=PHOTO, headers=RAW | {"Accept": "application/geo+json"}).json()
        == response.json()
    )


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"classes": "rde"}, "no class 'rde' here; did you mean 'red'?"),
        ({"classes": "4"}, "no class '4'"),
        ({"classes": "red\x1b[31m"}, r"\x1b"),
        ({"min_confidence": "high"}, "'min_confidence'"),
        ({"tolerance": "-1"}, "'tolerance'"),
        ({"size": "3000x3000"}, "at most 2000000 pixels"),
        ({"resolution": "native"}, "'resolution'"),
        ({"min-confidence": "1"}, "did you mean 'min_confidence'?"),
    ],
)
def test_wrong_queries_have_the_one_shape(http: httpx.Client, query: dict, said: str) -> None:
    response = http.post("/v1/segment", params=query, content=PHOTO, headers=RAW)
    assert (response.status_code, error(response)) == (400, "bad-query")
    assert said in response.json()["error"]["message"]
    assert "\x1b" not in response.text
    first = http.post("/v1/segment", params=query, content=b"not even an image", headers=RAW)
    assert error(first) == "bad-query"  # told before the body is looked at


def test_what_the_metrics_see_does_not_depend_on_what_is_asked(http: httpx.Client) -> None:
    """Drift is judged by them: a caller's filter must not look like another world."""

    def areas() -> dict[str, float]:
        lines = [
            line for line in http.get("/metrics").text.splitlines() if line.startswith("marginalia_class_area_share_t")
        ]
        return {line.partition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    marks = [areas()]
    for query in ({}, {"classes": "red", "min_confidence": 1}):
        ask(http, "mask", **query)
        marks.append(areas())
    grown = [{name: after[name] - before.get(name, 0.0) for name in after} for before, after in pairwise(marks)]
    assert grown[0] == pytest.approx(grown[1])
    assert sum(grown[0].values()) == pytest.approx(1)


def test_geojson_is_plain_json(http: httpx.Client) -> None:
    shape = json.loads(ask(http, "geojson", tolerance=2).content)
    assert list(shape) == ["type", "bundle", "width", "height", "features"]
    for feature in shape["features"]:
        for ring in feature["geometry"]["coordinates"]:
            assert ring[0] == ring[-1]
            assert len(ring) >= 4
            assert all(isinstance(value, int) for point in ring for value in point)
