"""The client against the real server, against one that misbehaves as it is told to, and as a file on its own."""

import asyncio
import json
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.bundle import bundle
from export.runtime import runtime
from pipeline.imaging import label_maps
from serving import client
from serving.client import AsyncClient, Client, ServiceError
from tests.support import live_server
from tests.support.image_files import save
from tests.support.live_server import Server

SMALL = np.random.default_rng(5).integers(0, 256, (4, 5, 3), dtype=np.uint8)
PICTURE = np.asarray(Image.fromarray(SMALL).resize((83, 57), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def here(server: Server) -> runtime.Runtime:
    return runtime.Runtime(bundle.open_bundle(server.folder / "champions/first/bundle"), provider="cpu", threads=1)


@pytest.fixture
def service(server: Server) -> Iterator[Client]:
    with Client(server.url, trust_env=False) as opened:
        yield opened


class Scripted(ThreadingHTTPServer):
    """Gives its answers in turn, the last one for ever: (status, headers, body), or None to cut the connection."""

    def __init__(self, *answers: tuple[int, dict[str, str], bytes] | None) -> None:
        super().__init__(("127.0.0.1", 0), _Reader)
        self.answers, self.seen = list(answers), list[tuple[str, bytes]]()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Reader(BaseHTTPRequestHandler):
    server: Scripted

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        self.server.seen.append((self.path, body))
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        self.close_connection = True
        if answer is None:
            return
        status, headers, body = answer
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *_: object) -> None: ...


def facts(value: int, name: str = "x", width: int = 3) -> dict[str, Any]:
    """A JSON answer: an image of one row, all of it class `value`."""
    row = {"id": value, "name": name, "color": [1, 2, 3], "pixels": width, "share": 1.0, "confidence": 0.5}
    rle = {"size": [1, width], "counts": label_maps.pack_counts([0, width])}
    return {"bundle": "b" * 16, "width": width, "height": 1, "confidence": 0.5, "classes": [row | {"rle": rle}]}


GOOD = (200, {"X-Bundle-Id": "b" * 16}, json.dumps(facts(7)).encode())
FULL = (
    503,
    {"Retry-After": "3"},
    json.dumps({"error": {"code": "overloaded", "message": "m", "request_id": "r"}}).encode(),
)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client wanted to wait; it does not."""
    wanted: list[float] = []

    async def at_once(seconds: float) -> None:
        wanted.append(seconds)

    monkeypatch.setattr(client.anyio, "sleep", at_once)
    return wanted


def check(found: client.Segmentation, here: runtime.Runtime) -> None:
    want = here.segment(PICTURE)
    np.testing.assert_array_equal(found.mask_HW, want.label_HW)
    assert (found.mask_HW.dtype, found.bundle) == (np.uint8, here.bundle.manifest.id)
    assert [item.name for item in found.classes] == [item.name for item in here.bundle.manifest.classes]
    for item in found.classes:
        assert item.pixels == (want.label_HW == item.id).sum()
        assert item.share == (want.label_HW == item.id).mean()
    assert found.confidence == pytest.approx(want.scaled_confidence_hw.mean() / 255)
    assert list(found.timings) == ["queue", "decode", "run", "encode"]
    assert len(found.request_id) == 32


def test_every_kind_of_image(service: Client, here: runtime.Runtime, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(save(Image.fromarray(PICTURE)))
    inputs = (file, str(file), file.read_bytes(), bytearray(file.read_bytes()), PICTURE, Image.fromarray(PICTURE))
    for image in inputs:
        check(service.segment(image), here)
    assert service.segment(Image.fromarray(PICTURE).convert("CMYK")).mask_HW.shape == PICTURE.shape[:2]


def test_under_asyncio(server: Server, here: runtime.Runtime) -> None:
    async def several() -> list[client.Segmentation]:
        async with AsyncClient(server.url, trust_env=False) as service:
            return await asyncio.gather(*(service.segment(PICTURE) for _ in range(4)))

    for found in asyncio.run(several()):
        check(found, here)


def test_one_client_for_several_threads(service: Client, here: runtime.Runtime) -> None:
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(service.segment, [PICTURE] * 8):
            check(found, here)


def test_the_services_own_bytes_and_model(service: Client, here: runtime.Runtime) -> None:
    palette = [item.color for item in here.bundle.manifest.classes]
    found = service.answer(PICTURE)
    assert (found.body, found.media_type) == (
        label_maps.encode_png(here.segment(PICTURE).label_HW, palette),
        "image/png",
    )
    assert service.answer(PICTURE, "overlay", accept="image/jpeg").media_type == "image/jpeg"
    assert service.model()["classes"][1] == {"id": 1, "name": "red", "color": [220, 30, 30]}


def test_an_arrays_wrong_form_is_told_before_anything_is_sent(service: Client) -> None:
    with pytest.raises(TypeError, match=r"uint8 .* not float64"):
        service.segment(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match=r"H x W .* not \(4, 4, 2\)"):
        service.segment(np.zeros((4, 4, 2), np.uint8))
    with pytest.raises(TypeError, match="not int"):
        service.segment(3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="absent"):
        service.segment("absent.jpg")


def test_errors_have_the_services_words(service: Client) -> None:
    with pytest.raises(ServiceError, match=r"not-an-image: .*status 400, request ") as caught:
        service.segment(b"words")
    error = caught.value
    assert (error.code, error.status, len(error.request_id or "")) == ("not-an-image", 400, 32)
    again = pickle.loads(pickle.dumps(error))
    assert (again.code, again.message, again.status) == (error.code, error.message, 400)
    with pytest.raises(ServiceError) as caught:
        service.answer(PICTURE, "sketch")
    assert (caught.value.code, caught.value.status) == ("bad-query", 400)


def test_token() -> None:
    url = live_server.guarded().url
    with Client(url, "wrong", trust_env=False) as stranger, pytest.raises(ServiceError) as caught:
        stranger.model()
    assert (caught.value.code, caught.value.status) == ("unauthorized", 401)
    with Client(url, live_server.TOKEN, trust_env=False) as known:
        assert known.model()["method"] == "supervised"
        assert live_server.TOKEN not in repr(vars(known))


def test_the_token_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARGINALIA_TOKEN", f"{live_server.TOKEN}\r\nthe-next-token\n")
    url = live_server.guarded().url
    with Client(url, mounts={"all://": None}) as known:
        assert known.model()["method"] == "supervised"
    with Client(url, trust_env=False) as stranger, pytest.raises(ServiceError, match="unauthorized"):
        stranger.model()
    with pytest.raises(ValueError, match="token") as caught:
        Client(url, "two\nlines-of-a-secret")
    assert "secret" not in str(caught.value)


def test_a_full_service_is_asked_again_until_it_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten at once where there is room for one: all are answered in the end, and those refused were told to wait."""
    pauses, sleep = [], client.anyio.sleep
    picture = save(Image.fromarray(PICTURE).resize((1200, 900)))

    async def shorter(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(seconds / 100)

    async def at_once() -> list[client.Segmentation]:
        async with AsyncClient(live_server.guarded().url, live_server.TOKEN, trust_env=False) as service:
            return await asyncio.gather(*(service.segment(picture) for _ in range(10)))

    monkeypatch.setattr(client.anyio, "sleep", shorter)
    assert {found.mask_HW.shape for found in asyncio.run(at_once())} == {(900, 1200)}
    assert len(pauses) >= 5
    assert min(pauses) > 1.0  # the service's Retry-After


def test_retry_after_is_the_least_pause_and_pauses_grow(pauses: list[float]) -> None:
    with Scripted(FULL, FULL, FULL, FULL, GOOD) as server, Client(server.url, trust_env=False) as service:
        assert service.segment(b"image").mask_HW.tolist() == [[7, 7, 7]]
    assert len(pauses) == 4
    for attempt, pause in enumerate(pauses):  # 3 s as told, and half to all of 0.2 s, doubled each time
        assert 3 + 0.1 * 2**attempt <= pause <= 3 + 0.2 * 2**attempt
    assert [body for _, body in server.seen] == [b"image"] * 5


def test_a_date_to_retry_after() -> None:
    date = "Wed, 21 Oct 2026 07:28:00 GMT"
    response = client.httpx.Response(503, headers={"Retry-After": date})
    assert client.retry_after_s(response, 1792567680.0 - 20) == 20
    assert client.retry_after_s(response, 1792567680.0 + 20) == 0
    for nonsense in ("soon", "-3", "٣", ""):
        assert client.retry_after_s(client.httpx.Response(503, headers={"Retry-After": nonsense.encode()}), 0.0) == 0


def test_a_pause_beyond_the_deadline_is_not_begun(pauses: list[float]) -> None:
    with Scripted(FULL) as server, Client(server.url, deadline_s=2, trust_env=False) as service:
        with pytest.raises(ServiceError) as caught:
            service.segment(b"image")
        assert (caught.value.code, caught.value.status, caught.value.request_id) == ("overloaded", 503, "r")
    assert (pauses, len(server.seen)) == ([], 1)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
@pytest.mark.parametrize(
    "call", [lambda service: service.segment(b"image"), lambda service: list(service.batch([b"i"]))]
)
def test_what_passes_is_asked_again_within_the_deadline(
    status: int, call: Callable[[Client], Any], pauses: list[float]
) -> None:
    """Its own words or a proxy's: too many requests, or a service that is full, slow or being started again."""
    answer = (status, {"Retry-After": "3"}, b"<h1>a proxy's page</h1>")
    line = (200, {}, lines({"index": 0, "answer": facts(7)}))
    last = GOOD if len(call.__code__.co_names) == 1 else line
    with Scripted(answer, answer, last) as server, Client(server.url, trust_env=False) as service:
        assert call(service)
    assert (len(pauses), len(server.seen), min(pauses) > 3) == (2, 3, True)

    pauses.clear()
    with Scripted(answer) as server, Client(server.url, deadline_s=2, trust_env=False) as service:
        with pytest.raises(ServiceError, match="proxy's page") as caught:
            call(service)
        assert caught.value.status == status
    assert (pauses, len(server.seen)) == ([], 1)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500])
def test_no_other_status_is_asked_again(status: int, pauses: list[float]) -> None:
    answer = (status, {"Retry-After": "1"}, b"<h1>a proxy's page</h1>")
    with Scripted(answer, GOOD) as server, Client(server.url, trust_env=False) as service:
        with pytest.raises(ServiceError, match="proxy's page") as caught:
            service.segment(b"image")
        assert (caught.value.code, caught.value.status) == ("bad-answer", status)
    assert (pauses, len(server.seen)) == ([], 1)


def test_a_broken_connection_is_tried_again(pauses: list[float]) -> None:
    cut_short = (200, {"Content-Length": "500"}, b'{"bundle": ')
    with Scripted(None, cut_short, GOOD) as server, Client(server.url, trust_env=False) as service:
        assert service.segment(b"image").classes[0].name == "x"
    assert (len(pauses), len(server.seen)) == (2, 3)


def test_nobody_there(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LONGEST_PAUSE_S", 60.0)  # so that soon the next pause would be too long
    with Client(f"http://127.0.0.1:{live_server.free_port()}", deadline_s=20.0, trust_env=False) as service:
        with pytest.raises(ServiceError, match=r"unreachable: ConnectError.* is it running") as caught:
            service.model()
        assert caught.value.status is None
    assert pauses


@pytest.mark.parametrize("call", [Client.model, lambda service: list(service.batch([b"image"]))])
def test_a_service_that_says_nothing(call: Callable[[Client], object]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(ServiceError, match=r"deadline: no answer within 2 seconds"):
            call(Client(url, deadline_s=2.0, trust_env=False))


@pytest.mark.parametrize(
    "body",
    [b"nothing", b"[]", b"{}", json.dumps(facts(7) | {"height": 2}).encode(), json.dumps(facts(700)).encode()],
)
def test_an_answer_of_another_service(body: bytes) -> None:
    with Scripted((200, {"X-Request-Id": "q"}, body)) as server, Client(server.url, trust_env=False) as service:
        with pytest.raises(ServiceError, match="bad-answer") as caught:
            service.segment(b"image")
        assert (caught.value.status, caught.value.request_id) == (200, "q")


def test_mask_and_confidence_are_of_one_bundle() -> None:
    def shade(bundle_id: str) -> tuple[int, dict[str, str], bytes]:
        return 200, {"X-Bundle-Id": bundle_id}, save(Image.fromarray(np.array([[0, 128, 255]], np.uint8)))

    with (
        Scripted(GOOD, shade("a" * 16), GOOD, shade("b" * 16)) as server,
        Client(server.url, trust_env=False) as service,
    ):
        found = service.segment(b"image", confidence=True, classes="x", min_confidence=0.5)
    assert found.confidence_HW is not None
    assert found.confidence_HW.tolist() == [[0, 128, 255]]
    assert [path for path, _ in server.seen] == [
        f"/v1/segment?classes=x&min_confidence=0.5&view={view}" for view in ("json", "confidence") * 2
    ]


def test_a_real_confidence_map(server: Server, service: Client, here: runtime.Runtime) -> None:
    with server.client() as http:
        if '"geojson"' not in http.get("/v1/openapi.json").text:
            pytest.skip("this service has no confidence answer yet")
    found, want = service.segment(PICTURE, confidence=True, min_confidence=0.5, classes="red,2"), here.segment(PICTURE)
    np.testing.assert_array_equal(found.confidence_HW, want.confidence_HW)
    kept = np.isin(want.label_HW, (1, 2)) & (want.confidence_HW >= 128)
    np.testing.assert_array_equal(found.mask_HW, np.where(kept, want.label_HW, client.IGNORE))


def test_a_real_batch(server: Server, service: Client, here: runtime.Runtime) -> None:
    with server.client() as http:
        if http.post("/v1/segment/batch").status_code == 404:
            pytest.skip("this service takes one image a call")
    pictures = [np.roll(PICTURE, 7 * i, axis=1)[: 30 + i] for i in range(20)]
    items = list(service.batch([*pictures[:5], b"words", *pictures[5:]]))
    assert sorted(item.index for item in items) == list(range(21))
    results = {item.index: item.result for item in items}
    assert [(item.index, item.error.code) for item in items if item.error] == [(5, "not-an-image")]
    for index, picture in zip((i for i in range(21) if i != 5), pictures, strict=True):
        found = results[index]
        assert found is not None
        np.testing.assert_array_equal(found.mask_HW, here.segment(picture).label_HW)
        assert found.bundle == here.bundle.manifest.id


def test_pixels_of_no_class_are_255() -> None:
    label_HW = np.random.default_rng(3).choice(np.array([2, 9, 255], np.uint8), (31, 17))
    runs = label_maps.class_rles(label_HW)
    row = {"name": "n", "color": [0, 0, 0], "pixels": 0, "share": 0.0, "confidence": None}
    classes = [row | {"id": i, "rle": runs[i]} for i in (2, 9)]
    told = {"bundle": "b", "height": 31, "width": 17, "confidence": 1.0, "classes": classes}
    np.testing.assert_array_equal(client.read_segmentation(told, "", {}).mask_HW, label_HW)


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_a_batch_that_breaks_goes_on_with_what_is_left(pauses: list[float]) -> None:
    refused = {"index": 1, "file": "1", "error": {"code": "corrupt", "message": "m"}, "answer": None}
    first = lines({"index": 2, "file": "2", "error": None, "answer": facts(7)}, refused)
    second = lines({"index": 1, "answer": facts(9)}, {"index": 0, "answer": facts(8)})
    with Scripted(
        FULL, (200, {"Content-Length": "9999"}, first), (200, {}, second)
    ) as server, Client(server.url, trust_env=False) as service:  # fmt: skip
        items = list(service.batch([b"zero", b"one", b"two", b"three"], size="model"))
    told = [(item.index, item.result and item.result.classes[0].id, item.error and item.error.code) for item in items]
    assert told == [(2, 7, None), (1, None, "corrupt"), (3, 9, None), (0, 8, None)]
    assert {path for path, _ in server.seen} == {"/v1/segment/batch?size=model"}
    assert [[word in body for word in (b"zero", b"one", b"two", b"three")] for _, body in server.seen] == [
        [True] * 4, [True] * 4, [True, False, False, True],
    ]  # fmt: skip
    assert len(pauses) == 2


def told(items: list[client.BatchItem]) -> dict[int, int | str]:
    """Index -> the class that fills the image, or the error's code."""
    return {
        item.index: item.result.classes[0].id if item.result else str(item.error and item.error.code) for item in items
    }


def test_what_cannot_be_read_is_an_item_with_an_error(tmp_path: Path) -> None:
    """The others of its group are sent and answered."""
    (tmp_path / "broken.png").write_bytes(save(Image.fromarray(PICTURE))[:200])
    images: list[client.Input] = [
        b"zero", tmp_path / "absent.jpg", b"two", np.zeros((2, 2)), Image.open(tmp_path / "broken.png"),
        Image.new("F", (2, 2)), tmp_path, b"seven",
    ]  # fmt: skip
    answer = (200, {}, lines(*({"index": i, "answer": facts(7 + i)} for i in range(3))))
    with Scripted(answer) as server, Client(server.url, trust_env=False) as service:
        items = list(service.batch(images))
    assert told(items) == {0: 7, 2: 8, 7: 9} | dict.fromkeys((1, 3, 4, 5, 6), "unreadable")
    errors = {item.index: str(item.error) for item in items if item.error}
    assert "absent.jpg" in errors[1]
    assert "uint8 (0..255), not float64" in errors[3]
    assert len(server.seen) == 1


def test_what_is_too_large_is_an_item_with_an_error_and_the_others_are_sent_in_parts(pauses: list[float]) -> None:
    """The service says it of a call; it is asked again with half, and of one image alone it is that image's error."""
    large = (413, {"Connection": "close"}, FULL[2].replace(b"overloaded", b"body-too-large"))
    many = (422, {}, FULL[2].replace(b"overloaded", b"too-many-images"))
    one, two = ((200, {}, lines(*({"index": i, "answer": facts(7)} for i in range(count)))) for count in (1, 2))
    with Scripted(many, large, one, large, two) as server, Client(server.url, trust_env=False) as service:
        items = list(service.batch([b"zero", b"one, which is large", b"two", b"three"]))
    assert told(items) == {0: 7, 1: "body-too-large", 2: 7, 3: 7}
    assert [item.error.status for item in items if item.error] == [413]
    assert [[word in body for word in (b"zero", b"one", b"two", b"three")] for _, body in server.seen] == [
        [True] * 4, [True, True, False, False], [True, False, False, False], [False, True, False, False],
        [False, False, True, True],
    ]  # fmt: skip
    assert pauses == []


def test_an_image_that_breaks_the_connection_is_an_item_with_an_error(pauses: list[float]) -> None:
    """The service is there in between: so it is one of the images, which is found by halves."""
    alive = (200, {}, b"")
    one = (200, {}, lines({"index": 0, "answer": facts(7)}))
    script = (None, None, None, alive, one, None, None, None, alive)
    with Scripted(*script) as server, Client(server.url, trust_env=False) as service:
        items = list(service.batch([b"good", b"bad"]))
    assert told(items) == {0: 7, 1: "unreachable"}
    assert "broke 3 times on this image alone" in str(items[1].error)
    assert [path for path, _ in server.seen if path == "/livez"] == ["/livez"] * 2
    with (
        Scripted(None) as server,
        Client(server.url, deadline_s=2, trust_env=False) as service,
        pytest.raises(ServiceError, match="unreachable"),  # nothing is there
    ):
        list(service.batch([b"good", b"bad"]))


def test_a_real_batch_with_what_is_too_large_and_what_is_missing(service: Client, here: runtime.Runtime) -> None:
    items = {item.index: item for item in service.batch([PICTURE, bytes(70 << 20), "absent.png", PICTURE])}
    assert {index: item.error and item.error.code for index, item in items.items()} == {
        0: None, 1: items[1].error and items[1].error.code, 2: "unreadable", 3: None,
    }  # fmt: skip
    # The service's words, or that the connection broke: it closes while most of the image is still on its way.
    assert items[1].error is not None
    assert items[1].error.code in ("body-too-large", "unreachable")
    label_HW = here.segment(PICTURE).label_HW
    for index in (0, 3):
        found = items[index].result
        assert found is not None
        np.testing.assert_array_equal(found.mask_HW, label_HW)


@pytest.mark.parametrize(
    ("image", "mode"),
    [
        (Image.fromarray(np.array([[1, 300, 65535]], np.uint16)), "I;16"),
        (Image.frombytes("I;16B", (3, 1), np.array([1, 300, 65535], ">u2").tobytes()), "I;16"),
        (Image.frombytes("RGBa", (1, 1), bytes((64, 32, 0, 128))), "RGBA"),
        (Image.frombytes("RGBA", (1, 1), bytes((64, 32, 0, 128))), "RGBA"),
    ],
)
def test_a_pillow_image_is_sent_with_all_its_bits_and_its_alpha(image: Image.Image, mode: str) -> None:
    sent = np.asarray(Image.open(client.io.BytesIO(client.encode(image))))
    if mode == "I;16":
        assert sent.tolist() == [[1, 300, 65535]]
    else:
        assert sent.tolist() == np.asarray(image.convert("RGBA")).tolist()


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_values_without_a_stated_range_are_refused_as_in_a_file(mode: str) -> None:
    with pytest.raises(ValueError, match=f"pixels of kind {mode} have no stated range"):
        client.encode(Image.new(mode, (2, 2)))


def test_a_long_batch_is_read_as_it_is_sent() -> None:
    taken = []

    def images() -> Iterator[bytes]:
        for index in range(40):
            taken.append(index)
            yield b"image"

    answers = [(200, {}, lines(*({"index": i, "answer": facts(7)} for i in range(n)))) for n in (16, 16, 8)]
    with Scripted(*answers) as server, Client(server.url, trust_env=False) as service:
        told = []
        for item in service.batch(images()):
            told.append(item.index)
            assert len(taken) <= len(told) + client.TOGETHER + 1
    assert told == list(range(40))
    assert len(server.seen) == 3


def test_a_batch_left_early_leaves_the_client_usable() -> None:
    two = lines({"index": 0, "answer": facts(7)}, {"index": 1, "answer": facts(7)})
    with Scripted((200, {}, two)) as server, Client(server.url, trust_env=False) as service:
        for _ in range(2):
            for item in service.batch([b"a", b"b"]):
                assert item.index == 0
                break
    assert len(server.seen) == 2


ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pipeline", "training", "export", "serving", "marginalia", "torch", "bentoml",
                                      "starlette", "pydantic", "onnxruntime", "prometheus_client", "yaml", "rich"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, ".")
from client import Client
with Client(sys.argv[1], trust_env=False) as service:
    found = service.segment("image.png")
    print(found.bundle, found.mask_HW.shape, {item.name: item.pixels for item in found.classes})
"""


def test_the_file_alone_is_enough(server: Server, here: runtime.Runtime, tmp_path: Path) -> None:
    (tmp_path / "client.py").write_bytes(Path(client.__file__).read_bytes())
    (tmp_path / "image.png").write_bytes(save(Image.fromarray(PICTURE)))
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, server.url], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    label_HW = here.segment(PICTURE).label_HW
    pixels = {item.name: int((label_HW == item.id).sum()) for item in here.bundle.manifest.classes}
    assert (done.stdout, done.stderr) == (f"{here.bundle.manifest.id} {label_HW.shape} {pixels}\n", "")


def test_a_closed_client_says_so(server: Server) -> None:
    service = Client(server.url, trust_env=False)
    service.close()
    service.close()
    with pytest.raises(RuntimeError, match="closed"):
        service.model()
