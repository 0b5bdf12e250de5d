"""A real server over real HTTP: every answer bit for bit what the runtime gives in this process."""

import io
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from export.bundle import bundle
from export.runtime import runtime
from pipeline.imaging import decode, label_maps
from serving.http import responses
from tests.support import tiny_onnx
from tests.support.image_files import exif, save
from tests.support.live_server import Server, error

RNG = np.random.default_rng(21)
PALETTE = [tuple(item["color"]) for item in tiny_onnx.CLASSES]


def blobs(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, so that the answer has regions of every class."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


PHOTO = save(Image.fromarray(blobs(133, 210)), "JPEG", quality=92)


@pytest.fixture(scope="module")
def here(server: Server) -> runtime.Runtime:
    return runtime.Runtime(bundle.open_bundle(server.folder / "champions/first/bundle"), provider="cpu", threads=1)


def post(http: httpx.Client, data: bytes, accept: str | None = None, query: str = "") -> httpx.Response:
    headers = {"Content-Type": "application/octet-stream"} | ({"Accept": accept} if accept else {})
    return http.post("/v1/segment" + query, content=data, headers=headers)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (64, 64), (65, 17), (480, 640), (1200, 900)])
def test_mask_png_of_any_size(http: httpx.Client, here: runtime.Runtime, size: tuple[int, int]) -> None:
    picture = blobs(*size, seed=size[0])
    response = post(http, save(Image.fromarray(picture)))
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    want = here.segment(picture).label_HW
    shown = Image.open(io.BytesIO(response.content))
    assert shown.mode == "P"
    np.testing.assert_array_equal(np.asarray(shown), want)
    np.testing.assert_array_equal(np.asarray(shown.convert("RGB")), np.array(PALETTE, np.uint8)[want])
    assert response.content == label_maps.encode_png(want, PALETTE)


def test_headers(http: httpx.Client, here: runtime.Runtime) -> None:
    response = post(http, PHOTO)
    assert response.headers["x-bundle-id"] == here.bundle.manifest.id
    phases = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert list(phases) == ["queue", "decode", "run", "encode"]
    assert min(float(value) for value in phases.values()) >= 0
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    mine = http.post("/v1/segment", content=PHOTO, headers={"Content-Type": "image/jpeg", "X-Request-Id": "job-7.a_B"})
    assert mine.headers["x-request-id"] == "job-7.a_B"
    strange = http.get("/v1/model", headers={"X-Request-Id": "no spaces {please}"})
    assert strange.headers["x-request-id"] != "no spaces {please}"
    assert len(strange.headers["x-request-id"]) == 32


def test_json(http: httpx.Client, here: runtime.Runtime) -> None:
    response = post(http, PHOTO, "application/json")
    assert response.headers["content-type"] == "application/json"
    found = responses.SegmentAnswer.model_validate_json(response.content, strict=True)
    picture = decode.decode(PHOTO, max_pixels=10**6)
    want = here.segment(picture)
    assert (found.bundle, found.height, found.width) == (here.bundle.manifest.id, 133, 210)
    assert [item.name for item in found.classes] == ["dark", "red", "green", "blue"]
    assert sum(item.pixels for item in found.classes) == 133 * 210
    for item in found.classes:
        mask = want.label_HW == item.id
        np.testing.assert_array_equal(label_maps.from_rle(item.rle.model_dump()), mask)
        assert item.pixels == mask.sum()
        assert item.share == mask.mean()
        seen = want.scaled_confidence_hw[want.scaled_label_hw == item.id]
        assert item.confidence == (pytest.approx(seen.mean() / 255) if seen.size else None)
    assert found.confidence == pytest.approx(want.scaled_confidence_hw.mean() / 255)


@pytest.mark.parametrize(
    ("accept", "query", "kind"),
    [("image/png;view=overlay", "", "png"), (None, "?view=overlay", "png"), ("image/jpeg", "", "jpeg")],
)
def test_overlay(http: httpx.Client, here: runtime.Runtime, accept: str | None, query: str, kind: str) -> None:
    response = post(http, PHOTO, accept, query)
    assert response.headers["content-type"] == f"image/{kind}"
    picture = decode.decode(PHOTO, max_pixels=10**6)
    want = label_maps.overlay(picture, here.segment(picture).label_HW, PALETTE, 0.5)
    if kind == "jpeg":
        assert response.content == save(Image.fromarray(want), "JPEG", quality=responses.JPEG_QUALITY)
    else:
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(response.content))), want)


def test_every_format_and_content_type_gives_the_same_answer(http: httpx.Client) -> None:
    picture = Image.fromarray(blobs(70, 50))
    want = post(http, save(picture)).content
    for kind in ("PNG", "BMP", "TIFF"):
        for content_type in (f"image/{kind.lower()}", "image/anything", "application/x-www-form-urlencoded"):
            headers = {"Content-Type": content_type}
            assert http.post("/v1/segment", content=save(picture, kind), headers=headers).content == want
    form = http.post("/v1/segment", files={"image": ("a.png", save(picture), "image/png")})
    assert form.status_code == 200
    assert form.content == want
    nameless = http.post("/v1/segment", files={"image": ("blob", save(picture))})
    assert nameless.content == want


def test_a_turned_photograph_is_answered_upright(http: httpx.Client) -> None:
    picture = blobs(40, 90)
    turned = post(http, save(Image.fromarray(picture), exif=exif(6)))
    upright = post(http, save(Image.fromarray(np.rot90(picture, -1).copy())))
    assert Image.open(io.BytesIO(turned.content)).size == (40, 90)
    assert turned.content == upright.content


@pytest.mark.skipif(shutil.which("curl") is None, reason="this is the README's line: it needs curl")
def test_the_readmes_curl_line(server: Server, tmp_path: object) -> None:
    command = ["curl", "-s", "--noproxy", "*", "--data-binary", "@-", server.url + "/v1/segment"]
    done = subprocess.run(command, input=PHOTO, capture_output=True, check=True)
    assert Image.open(io.BytesIO(done.stdout)).size == (210, 133)


def test_requests_at_once_get_their_own_answers(server: Server, here: runtime.Runtime) -> None:
    pictures = [blobs(50 + i, 80 - i, seed=i) for i in range(24)]
    with server.client() as client, ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda p: post(client, save(Image.fromarray(p))), pictures))
    for picture, response in zip(pictures, found, strict=True):
        assert response.status_code == 200
        np.testing.assert_array_equal(
            np.asarray(Image.open(io.BytesIO(response.content))), here.segment(picture).label_HW
        )


@pytest.mark.parametrize(
    ("accept", "query", "kind"),
    [
        ("*/*", "", "image/png"),
        ("text/html,application/xhtml+xml,image/avif,image/webp,*/*;q=0.8", "", "image/png"),
        ("application/json, image/png;q=0.5", "", "application/json"),
        ("image/png;q=0.2, application/json;q=0.9", "", "application/json"),
        ("image/*", "", "image/png"),
        ("image/*;q=0.1, application/*", "", "application/json"),
        ("image/png;q=0, */*", "", "application/json"),
        ("*/*", "?view=json", "application/json"),
        ("image/jpeg, image/png;q=0.4", "?view=overlay", "image/jpeg"),
    ],
)
def test_negotiation(http: httpx.Client, accept: str, query: str, kind: str) -> None:
    response = post(http, PHOTO, accept, query)
    assert (response.status_code, response.headers["content-type"]) == (200, kind)
    assert response.headers["vary"] == "Accept"


@pytest.mark.parametrize(
    ("accept", "query"),
    [("text/html", ""), ("image/webp", ""), ("image/png;view=sketch", ""), ("image/jpeg", "?view=mask"),
     ("application/json", "?view=overlay"), ("*/*;q=0", ""), ("nonsense", "")],
)  # fmt: skip
def test_406(http: httpx.Client, accept: str, query: str) -> None:
    response = post(http, PHOTO, accept, query)
    assert (response.status_code, error(response)) == (406, "not-acceptable")


def test_other_addresses_and_methods(http: httpx.Client) -> None:
    for path in ("/nothing", "/v1", "/v1/segment/", "/v1/../etc/passwd", "/v2/segment"):
        assert error(http.get(path)) == "not-found"
        assert http.get(path).status_code == 404
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH"):
        response = http.request(method, "/v1/segment")
        assert (response.status_code, error(response), response.headers["allow"]) == (405, "method", "POST")
    response = http.post("/v1/model")
    assert (response.status_code, error(response), response.headers["allow"]) == (405, "method", "GET")


def test_model(http: httpx.Client, here: runtime.Runtime) -> None:
    facts = http.get("/v1/model").json()
    assert facts["bundle"] == here.bundle.manifest.id
    assert facts["classes"] == tiny_onnx.CLASSES
    assert facts["input"]["long_side"] == 64
    assert facts["metrics"] == {"miou": 61.5}
    assert facts["provider"] in ("cpu", "cuda")


def test_openapi_describes_what_is_answered(http: httpx.Client) -> None:
    document = http.get("/v1/openapi.json").json()
    schemas = document["components"]["schemas"]
    answer = post(http, PHOTO, "application/json").json()
    assert set(answer) == set(schemas["SegmentAnswer"]["properties"])
    assert set(answer["classes"][0]) == set(schemas["ClassAnswer"]["properties"])
    shape = post(http, PHOTO, "application/geo+json").json()
    assert set(shape) == set(schemas["FeatureCollection"]["properties"])
    assert set(shape["features"][0]["properties"]) == set(schemas["PieceProperties"]["properties"])
    assert set(http.get("/v1/model").json()) == set(schemas["ModelAnswer"]["properties"])


def test_probes_and_page(http: httpx.Client) -> None:
    for probe in ("/livez", "/readyz", "/healthz"):
        assert http.get(probe).status_code == 200
    for path in ("/", "/ui"):
        page = http.get(path)
        assert page.headers["content-type"].startswith("text/html")
        assert "connect-src 'self'" in page.headers["content-security-policy"]
        assert "http://" not in page.text
        assert "https://" not in page.text
