"""large_images: what is read, run and encoded in bands is what the whole-image path answers; bounds and refusals."""

import io
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from export.runtime.runtime import Runtime, Segmentation
from pipeline.imaging import decode
from pipeline.imaging.decode import Refused
from pipeline.imaging.mask_png import encode_bands
from serving.http import large_images, negotiate, responses, spool
from serving.http.large_images import WindowModel
from serving.http.query import Query
from serving.http.requests import Problem
from serving.settings import Settings
from tests.support import live_server, tiny_onnx
from tests.support.image_files import exif, save
from tests.support.live_server import Server, error

RNG = np.random.default_rng(31)
SETTINGS = Settings(large_pixels=3000, max_whole_pixels=300_000, max_pixels=40_000_000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return Runtime(tiny_onnx.write(tmp_path_factory.mktemp("tiny") / "bundle"), provider="cpu", threads=1)


@pytest.fixture(autouse=True)
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_images, "_BAND_PIXELS", 2000)
    monkeypatch.setattr(TiffImagePlugin, "STRIP_SIZE", 5000)


def blobs(height: int, width: int) -> np.ndarray:
    small = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def nothing() -> None:
    """Nobody has stopped waiting."""


def ask(model: Runtime, data: bytes, query: Query, check: Callable[[], None] = nothing) -> responses.Rendered:
    def run(image_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert max(image_HWC.shape) <= 64  # the tiny model's long side
        label, confidence = model.run(image_HWC[None])
        return label[0], confidence[0]

    kind = negotiate.one(query.view or "mask")
    done, timings = large_images.segment(io.BytesIO(data), kind, query, WindowModel(model.bundle, run, check), SETTINGS)
    assert list(timings) == ["decode", "run", "encode"]
    assert min(timings.values()) >= 0
    return done


def whole(model: Runtime, picture: np.ndarray, query: Query) -> responses.Rendered:
    """The ordinary path's answer; at native resolution that of one look at the whole image, as the tiny model sees
    single pixels."""
    if query.resolution == "fit":
        found = model.segment(picture)
    else:
        label, confidence = pixelwise(picture)
        found = Segmentation(label, confidence, label, confidence, {})
    return responses.render(negotiate.one(query.view or "mask"), picture, found, model.bundle.manifest, query)


def pixelwise(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    label, confidence = tiny_onnx.expected(picture[None])
    return label[0], confidence[0]


def shown(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)))


def same(got: responses.Rendered, want: responses.Rendered) -> None:
    if want.body.startswith(b"\x89PNG"):
        np.testing.assert_array_equal(shown(got.body), shown(want.body))
    else:
        assert got.body == want.body
    assert (got.observed, got.asked) == (want.observed, want.asked)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("size", [(300, 411), (209, 150), (61, 59)])
@pytest.mark.parametrize("view", ["mask", "confidence", "json"])
def test_fit_answers_as_the_whole_image_path(model: Runtime, kind: str, size: tuple[int, int], view: str) -> None:
    picture, query = blobs(*size), Query(view=view)
    data = save(Image.fromarray(picture), kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    same(ask(model, data, query), whole(model, picture, query))


def test_a_turned_image_and_a_jpeg_come_back_upright(model: Runtime) -> None:
    """The reduced image differs by a grey level here and there, so a few pixels between classes may too."""
    for kind, turned in (("PNG", 6), ("PNG", 3), ("JPEG", 8), ("JPEG", 1), ("TIFF", 1)):
        size = (1900, 200) if kind == "TIFF" else (600, 800)
        data = save(Image.fromarray(blobs(*size)), kind, exif=exif(turned))
        want = model.segment(decode.decode(data, max_pixels=10**6)).label_HW
        got = shown(ask(model, data, Query()).body)
        assert got.shape == want.shape
        assert (got == want).mean() > 0.99


@pytest.mark.parametrize("size", [(5, 9), (63, 64), (64, 64), (64, 65), (65, 130), (200, 171), (300, 40)])
@pytest.mark.parametrize("kind", ["PNG", "BMP"])
@pytest.mark.parametrize("view", ["mask", "confidence"])
def test_full_resolution_has_no_seams(model: Runtime, size: tuple[int, int], kind: str, view: str) -> None:
    picture = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    query = Query(view=view, resolution="full")
    same(ask(model, save(Image.fromarray(picture), kind), query), whole(model, picture, query))


@pytest.mark.parametrize("resolution", ["fit", "full"])
@pytest.mark.parametrize(
    "asked",
    [
        {"size": "50x30"},
        {"size": "77x99"},
        {"size": "290x300"},
        {"size": "model"},
        {"classes": "red,3"},
        {"min_confidence": 0.6},
        {"classes": "green", "min_confidence": 0.4, "size": "41x160"},
        {"view": "json", "size": "50x30"},
        {"view": "geojson", "size": "50x30", "tolerance": 0},
        {"view": "overlay", "size": "50x30"},
    ],
)
def test_what_is_asked_for_is_answered_as_by_the_whole_image_path(
    model: Runtime, resolution: str, asked: dict[str, object]
) -> None:
    picture, query = blobs(150, 170), Query(resolution=resolution, **asked)
    same(ask(model, save(Image.fromarray(picture)), query), whole(model, picture, query))


def test_an_answer_larger_than_an_ordinary_image(model: Runtime) -> None:
    picture, query = blobs(40, 50), Query(size="201x333")
    assert not large_images.is_large(2000, Query(), SETTINGS)
    assert large_images.is_large(2000, query, SETTINGS)
    same(ask(model, save(Image.fromarray(picture)), query), whole(model, picture, query))


def problem(model: Runtime, data: bytes, query: Query) -> tuple[int, str]:
    with pytest.raises(Problem) as caught:
        ask(model, data, query)
    return caught.value.status, caught.value.code


def test_views_that_a_huge_image_has_not(model: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    data = save(Image.fromarray(blobs(100, 90)))
    refused = (422, "too-large-for-view")
    for query in (
        Query(view="overlay"),
        Query(view="geojson"),
        Query(view="overlay", resolution="full"),
        Query(view="json", resolution="full"),
        Query(view="overlay", size="60x60"),
    ):
        assert problem(model, data, query) == refused
    monkeypatch.setattr(large_images, "MOST_RUNS", 89)
    assert problem(model, data, Query(view="json")) == refused


def test_what_must_be_whole_has_its_own_limit(model: Runtime) -> None:
    data = save(Image.fromarray(blobs(600, 800)), "JPEG")
    assert ask(model, data, Query()).body
    with pytest.raises(Refused, match="limit for that is 300000"):
        ask(model, data, Query(resolution="full"))


class Stopped(Exception):
    """What a job raises when nobody waits for it."""


def test_a_stop_ends_the_work_on_a_huge_image(model: Runtime) -> None:
    data = save(Image.fromarray(blobs(300, 300)))
    looked = []

    def check() -> None:
        looked.append(1)
        if len(looked) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        ask(model, data, Query(resolution="full"), check)
    assert len(looked) == 3


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = live_server.start({"MARGINALIA_LARGE_PIXELS": "1000000", "MARGINALIA_MAX_BODY_MB": "9"})
    yield started
    started.stop()


RAW = {"Content-Type": "application/octet-stream"}


def test_over_http(http: httpx.Client, model: Runtime) -> None:
    noise = RNG.integers(0, 256, (1000, 1100, 3), dtype=np.uint8)
    answer = http.post("/v1/segment?resolution=full", content=save(Image.fromarray(noise)), headers=RAW)
    assert answer.status_code == 200, answer.text
    np.testing.assert_array_equal(shown(answer.content), pixelwise(noise)[0])
    assert [part.split(";")[0] for part in answer.headers["server-timing"].split(", ")] == [
        "queue",
        "decode",
        "run",
        "encode",
    ]
    assert answer.headers["x-bundle-id"] == model.bundle.manifest.id
    refused = http.post("/v1/segment?view=overlay", content=save(Image.fromarray(noise)), headers=RAW)
    assert (refused.status_code, error(refused)) == (422, "too-large-for-view")
    wrong = http.post("/v1/segment?resolution=half", content=b"", headers=RAW)
    assert (wrong.status_code, error(wrong)) == (400, "bad-query")


def test_bodies_on_disk(http: httpx.Client, model: Runtime) -> None:
    """10 MB, more than this server takes into memory: a huge image is answered, an ordinary one is refused."""
    noise = RNG.integers(0, 256, (1700, 2000, 3), dtype=np.uint8)
    body = save(Image.fromarray(noise), "TIFF")
    assert len(body) > 9 << 20 > spool.SPOOLED
    answer = http.post("/v1/segment", content=body, headers=RAW)
    assert answer.status_code == 200, answer.text
    np.testing.assert_array_equal(shown(answer.content), model.segment(noise).label_HW)
    small = save(Image.fromarray(noise[:100, :100])) + bytes(10 << 20)
    refused = http.post("/v1/segment", content=small, headers=RAW)
    assert (refused.status_code, error(refused)) == (413, "body-too-large")
    in_memory = save(Image.fromarray(noise[:100, :100])) + bytes(17 << 19)  # 8.5 MB: to disk, and back
    answer = http.post("/v1/segment", content=in_memory, headers=RAW)
    np.testing.assert_array_equal(shown(answer.content), model.segment(noise[:100, :100]).label_HW)
    broken = http.post("/v1/segment", content=body[:-3_000_000], headers=RAW)
    assert (broken.status_code, error(broken)) in [(400, "corrupt"), (400, "truncated")]


@pytest.mark.slow
def test_memory_stays_that_of_a_band(server: Server, http: httpx.Client) -> None:
    """30 megapixels: decoded whole they would take 30 MB as grey and 90 MB as colours, and the label map 30 MB."""
    rows = np.add.outer(np.arange(5000) // 40, np.arange(6000) // 50).astype(np.uint8)
    data = b"".join(encode_bands([rows], 5000, 6000, highest=255))
    assert http.post("/v1/segment", content=save(Image.fromarray(blobs(1000, 990))), headers=RAW).status_code == 200
    before = server.peak_mb()
    answer = http.post("/v1/segment", content=data, headers=RAW, timeout=60)
    assert answer.status_code == 200, answer.text
    assert server.peak_mb() - before < 40
    assert shown(answer.content).shape == (5000, 6000)
