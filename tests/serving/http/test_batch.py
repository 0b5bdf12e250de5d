"""Many images in one call over real HTTP: each answered as if it had come alone, bad ones as lines, in order, streamed."""

import asyncio
import io
import json
import logging
import socket
import struct
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from export.bundle.bundle import open_bundle
from export.runtime import geojson
from serving.http import batch, batch_body, responses
from serving.http.batch import BatchHandler
from serving.http.batch_body import Sent
from serving.http.negotiate import MANY_KINDS, one
from serving.http.query import Query
from serving.http.requests import Problem
from serving.http.segment import SegmentHandler
from serving.model import loader
from serving.model.manager import ModelManager
from serving.settings import Settings
from tests.support import tiny_onnx
from tests.support.image_files import save
from tests.support.live_server import Server, error, until
from tests.support.threaded_server import LONGEST, Held, serving, told

RNG = np.random.default_rng(11)
URL = "/v1/segment/batch"
JSONL, ZIP = {"Accept": "application/jsonl"}, {"Accept": "application/zip"}


def photo(height: int, width: int, kind: str = "PNG") -> bytes:
    return save(Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)), kind)


GOOD = {
    f"folder/{i}.{kind.lower()}": photo(20 + 7 * i, 40 - 3 * i, kind)
    for i, kind in enumerate(["PNG", "JPEG", "BMP"] * 3)
}
BAD = {
    "text.jpg": (b"Just some text.", "not-an-image"),
    "nothing.png": (b"", "empty"),
    "half.png": (photo(30, 30)[:700], "truncated"),
    "long.png": (photo(1, 200), "bad-aspect"),
    "moving.gif": (b"GIF89a\x01\x00\x01\x00", "unsupported-format"),
    "large.png": (photo(8, 8) + bytes(2 << 20), "body-too-large"),
}
ALL = dict(zip([*GOOD, *BAD], [*GOOD.values(), *(data for data, _ in BAD.values())], strict=True))
ORDER = [str(name) for name in RNG.permutation(list(ALL))]


def form(names: list[str]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("image", (name, ALL[name])) for name in names]


def packed(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def post_zip(http: httpx.Client, body: bytes, headers: dict[str, str] = JSONL, query: str = "") -> httpx.Response:
    return http.post(URL + query, content=body, headers={"Content-Type": "application/zip"} | headers)


def alone(http: httpx.Client, name: str, query: str = "") -> httpx.Response:
    return http.post("/v1/segment" + query, content=ALL[name], headers={"Content-Type": "application/octet-stream"})


@pytest.mark.parametrize("sent_as", ["form", "zip"])
@pytest.mark.parametrize("view", ["json", "geojson"])
def test_lines_are_what_each_image_gets_alone(http: httpx.Client, sent_as: str, view: str) -> None:
    query = f"?view={view}&classes=red,blue&min_confidence=0.3"
    if sent_as == "form":
        response = http.post(URL + query, files=form(ORDER), headers=JSONL)
    else:
        response = post_zip(http, packed({name: ALL[name] for name in ORDER}), query=query)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/jsonl")
    lines = response.text.splitlines()
    bundle = http.get("/v1/model").json()["bundle"]
    for number, (name, line) in enumerate(zip(ORDER, lines, strict=True)):
        facts = json.loads(line)
        responses.Line.model_validate(facts)
        assert (facts["index"], facts["file"], facts["bundle"]) == (number, name, bundle)
        if name in GOOD:
            want = alone(http, name, query)
            assert facts["answer"] == want.json()
            shape = responses.SegmentAnswer if view == "json" else geojson.FeatureCollection
            shape.model_validate_json(want.content, strict=True)
        else:
            assert sorted(facts) == ["bundle", "error", "file", "index"]
            assert facts["error"]["code"] == BAD[name][1]
            assert len(facts["error"]["message"]) > 10


@pytest.mark.parametrize("view", ["mask", "overlay", "confidence", "geojson"])
def test_a_zip_has_a_member_for_each_image_and_the_lines(http: httpx.Client, view: str) -> None:
    response = post_zip(http, packed({name: ALL[name] for name in ORDER}, zipfile.ZIP_STORED), ZIP, f"?view={view}")
    assert (response.status_code, response.headers["content-type"]) == (200, "application/zip")
    archive = zipfile.ZipFile(io.BytesIO(response.content))
    assert archive.testzip() is None
    good = [name for name in ORDER if name in GOOD]
    ending = "geojson" if view == "geojson" else "png"
    members = [f"{name.rpartition('.')[0]}.{ending}" for name in good]
    assert archive.namelist() == [*members, "answers.jsonl"]
    lines = {facts["file"]: facts for facts in map(json.loads, archive.read("answers.jsonl").splitlines())}
    assert list(lines) == ORDER
    for name, member in zip(good, members, strict=True):
        want = alone(http, name, f"?view={view}")
        assert archive.read(member) == want.content
        line = responses.Line.model_validate(lines[name])
        assert line.member == member
        shares = dict(part.split("=") for part in want.headers["x-class-areas"].split(", "))
        assert {key: value for key, value in (line.areas or {}).items() if value} == {
            k: float(v) for k, v in shares.items()
        }
        assert line.confidence == float(want.headers["x-confidence"])
    for name, (_, code) in BAD.items():
        assert lines[name]["error"]["code"] == code


def test_images_of_one_name_do_not_meet(http: httpx.Client) -> None:
    names = ["a.png", "A.jpg", "a.png", "answers.jsonl", "/x/../b.png".replace("..", "c"), ""]
    data = ALL["folder/0.png"]
    response = http.post(URL, files=[("image", (name or "blob", data)) for name in names], headers=ZIP)
    archive = zipfile.ZipFile(io.BytesIO(response.content))
    assert archive.namelist() == [
        "a.png",
        "A-2.png",
        "a-3.png",
        "answers.png",
        "x/c/b.png",
        "blob.png",
        "answers.jsonl",
    ]
    assert len({name.lower() for name in archive.namelist()}) == 7


@pytest.mark.parametrize(
    ("accept", "query", "kind"),
    [
        (None, "", "application/jsonl"),
        ("*/*", "?view=mask", "application/zip"),
        ("application/zip", "?view=json", "application/zip"),
        ("application/zip, application/jsonl;q=0.5", "", "application/zip"),
        ("application/zip;view=overlay", "", "application/zip"),
    ],
)
def test_negotiation(http: httpx.Client, accept: str | None, query: str, kind: str) -> None:
    response = http.post(URL + query, files=form(["folder/0.png"]), headers={"Accept": accept} if accept else {})
    assert (response.status_code, response.headers["content-type"], response.headers["vary"]) == (200, kind, "Accept")
    assert len(response.headers["x-request-id"]) == 32


def test_what_is_wrong_with_the_call_is_told_at_once(http: httpx.Client) -> None:
    def refused(response: httpx.Response) -> tuple[int, str]:
        return response.status_code, error(response)

    one_image = form(["folder/0.png"])
    assert refused(http.post(URL, files=one_image, headers={"Accept": "image/png"})) == (406, "not-acceptable")
    assert refused(http.post(URL + "?view=mask", files=one_image, headers=JSONL)) == (406, "not-acceptable")
    assert refused(http.post(URL + "?clases=red", files=one_image)) == (400, "bad-query")
    assert refused(http.post(URL + "?classes=pink", files=one_image)) == (400, "bad-query")
    assert refused(http.post(URL, files=[("picture", ("a.png", b"x"))])) == (400, "bad-multipart")
    assert refused(http.post(URL, files=[("image", ("../a.png", b"x"))])) == (400, "bad-multipart")
    assert refused(http.post(URL, files=[("image", ("a" * 256, b"x"))])) == (400, "bad-multipart")
    assert refused(http.post(URL, files=[*one_image, ("other", (None, "1"))])) == (400, "bad-multipart")
    assert refused(http.post(URL, files=one_image * 257)) == (400, "bad-multipart")
    for kind in ("image/png", "application/json", "application/gzip", ""):
        assert refused(http.post(URL, content=b"x", headers={"Content-Type": kind})) == (415, "unsupported-type")
    gzipped = {"Content-Encoding": "gzip"}
    assert refused(post_zip(http, packed(GOOD), gzipped)) == (415, "unsupported-type")
    assert refused(post_zip(http, b"")) == (400, "empty")
    assert refused(http.get(URL)) == (405, "method")
    large = http.post(URL, content=iter([bytes(1 << 20)] * 65), headers={"Content-Type": "application/zip"})
    assert refused(large) == (413, "body-too-large")
    assert "send fewer at a time" in large.text


def link_member() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        item = zipfile.ZipInfo("link.png")
        item.external_attr = 0o120777 << 16
        archive.writestr(item, "/etc/passwd")
    return buffer.getvalue()


def encrypted() -> bytes:
    body = bytearray(packed({"a.png": b"x"}))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        body[body.index(mark) + at] |= 1
    return bytes(body)


HOSTILE = {
    "no zip": b"GIF89a",
    "empty": packed({}),
    "only folders": packed({"a/": b""}),
    "cut": packed(GOOD)[:-30],
    "way out": packed({"../../etc/passwd": b"x"}),
    "absolute": packed({"/etc/passwd": b"x"}),
    "drive": packed({"C:/x.png": b"x"}),
    "backslash": packed({"..\\x.png": b"x"}),
    "control": packed({"a\x1b[31m.png": b"x"}),
    "long": packed({"a" * 300 + ".png": b"x"}),
    "link": link_member(),
    "password": encrypted(),
    "lzma": packed({"a.png": b"x"}, zipfile.ZIP_LZMA),
    "bomb": packed({f"{i}.bmp": bytes(1 << 20) for i in range(20)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_zip_is_refused_whole(http: httpx.Client, name: str) -> None:
    response = post_zip(http, HOSTILE[name])
    assert (response.status_code, error(response)) == (400, "bad-archive")
    assert response.text.isprintable()


def test_too_many_members(http: httpx.Client) -> None:
    response = post_zip(http, packed({f"{i}.png": b"x" for i in range(257)}))
    assert (response.status_code, error(response)) == (422, "too-many-images")


def zip64() -> bytes:
    """The end record says nothing out of the ordinary; the zip64 one before it, which zipfile believes, does."""
    body = packed({"a.png": b"x"})
    end, at = body[-22:], body.index(b"PK\x01\x02")
    size = len(body) - 22 - at
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size, at)
    return body[:-22] + record + struct.pack("<4sLQL", b"PK\x06\x07", 0, len(body) - 22, 1) + end


def forged(at: int, value: bytes, comment: bytes = b"") -> bytes:
    """A zip whose end record has `value` at byte `at`."""
    body = bytearray(packed({"a.png": b"x"}))
    body[len(body) - 22 + at : len(body) - 22 + at + len(value)] = value
    body[-2:] = len(comment).to_bytes(2, "little")
    return bytes(body) + comment


VAST = {
    "entries": packed({str(i): b"" for i in range(14_000)}),
    "zip64": zip64(),
    "zip64 entries": forged(10, b"\xff\xff"),
    "zip64 size": forged(12, b"\xff\xff\xff\xff"),
    "zip64 place": forged(16, b"\xff\xff\xff\xff"),
    "size": forged(12, (256 * 2048 + 65536 + 1).to_bytes(4, "little")),
    "size before a comment": forged(12, (256 * 2048 + 65536 + 1).to_bytes(4, "little"), bytes(65_000)),
}


@pytest.mark.parametrize("name", VAST)
def test_a_vast_directory_is_not_looked_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(Problem, match="directory") as caught:
        batch_body.open_zip(VAST[name], Settings())
    assert caught.value.code == "too-many-images"


def test_many_images_in_folders_with_long_names_and_a_comment_are_taken() -> None:
    buffer = io.BytesIO(packed({f"{i % 40:0200}/" + name: b"x" for i in range(256) for name in ("", f"{i:0200}.png")}))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"PK\x05\x07" * 16_000
    assert len(batch_body.open_zip(buffer.getvalue(), Settings())) == 256


def test_a_damaged_member_is_one_line(http: httpx.Client) -> None:
    """Its bytes do not have the checksum that the directory states; its neighbours are fine."""
    files = {"a.png": ALL["folder/0.png"], "b.bmp": ALL["folder/2.bmp"], "c.png": ALL["folder/3.png"]}
    body = packed(files, zipfile.ZIP_STORED)
    at = body.index(files["b.bmp"]) + 200
    codes = [
        json.loads(line).get("error", {}).get("code")
        for line in post_zip(http, body[:at] + bytes([body[at] ^ 255]) + body[at + 1 :]).text.splitlines()
    ]
    assert codes == [None, "corrupt", None]


def test_a_member_that_understates_its_size_is_one_line(http: httpx.Client) -> None:
    body = bytearray(packed({"a.bmp": bytes(3 << 20), "b.png": ALL["folder/0.png"]}))
    at = body.index(b"PK\x01\x02") + 24
    body[at : at + 4] = (1000).to_bytes(4, "little")
    lines = [json.loads(line) for line in post_zip(http, bytes(body)).text.splitlines()]
    assert [line.get("error", {}).get("code") for line in lines] == ["corrupt", None]


@pytest.mark.parametrize("accept", ["application/jsonl", "application/zip"])
def test_a_client_that_leaves_gives_its_place_back(server: Server, http: httpx.Client, accept: str) -> None:
    """More often than calls may be under way; the last one is answered."""
    body = packed({f"{i}.png": ALL["folder/0.png"] for i in range(200)})
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nContent-Type: application/zip\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
            link.sendall(head.encode() + body)
            assert link.recv(10).startswith(b"HTTP/1.1 2")
        until(lambda: post_zip(http, packed({"a.png": b"x"})).status_code == 200)
    until(lambda: "marginalia_in_flight 0.0" in http.get("/metrics").text)
    assert server.events("internal-error") == []
    assert "Traceback" not in server.log()


@pytest.fixture
def model(tmp_path: Path) -> Held:
    return Held(tmp_path / "held")


def test_only_so_many_calls_are_answered_at_a_time(model: Held) -> None:
    """One that is being answered keeps the next out before its body has come; one that still sends keeps nobody out."""
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/zip\r\nContent-Length: 1000\r\n\r\nPK"
    body = packed({"a.png": ALL["folder/0.png"]})
    with serving(model, many_calls=1) as own, own.client() as http, ThreadPoolExecutor(1) as pool:
        with socket.create_connection(("127.0.0.1", own.port), LONGEST) as slow:
            slow.sendall(head.encode())
            until(lambda: own.handler.admission.bytes == 2)
            assert post_zip(http, body).status_code == 200
        model.gate.clear()
        first = pool.submit(post_zip, http, body)
        until(lambda: model.shapes[1:])
        with socket.create_connection(("127.0.0.1", own.port), LONGEST) as second:
            second.sendall(head.encode())
            answer = b""
            while b"}}" not in answer:
                piece = second.recv(4096).lower()
                assert piece, answer
                answer += piece
        assert answer.startswith(b"http/1.1 503")
        assert b"overloaded" in answer
        assert b"retry-after: " in answer
        model.gate.set()
        assert first.result(LONGEST).status_code == 200
        until(lambda: post_zip(http, body).status_code == 200)


def test_an_answer_that_takes_too_long_is_cut_off_and_gives_its_place_back(model: Held) -> None:
    model.gate.clear()
    body = packed({"a.png": ALL["folder/0.png"]})
    with serving(model, many_calls=1, many_timeout_s=1) as own, own.client() as http:
        with pytest.raises(httpx.RemoteProtocolError):
            post_zip(http, body)
        own.limit(many_timeout_s=LONGEST)
        model.gate.set()
        until(lambda: own.handler.admission.requests == own.handler.admission.bytes == 0)
        assert 'marginalia_rejected_total{reason="deadline"}' in http.get("/metrics").text
        until(lambda: post_zip(http, body, ZIP).status_code == 200)


class Failing(Held):
    def run(self, images_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise RuntimeError("the card fell off the bus")


def test_a_failure_is_logged_under_the_request_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "marginalia")
    with serving(Failing(tmp_path / "bundle")) as own, own.client() as http:
        response = post_zip(http, packed({"a.png": ALL["folder/0.png"]}))
    assert response.json()["error"]["code"] == "internal"
    logged = told(caplog, "internal-error")
    assert [line["request_id"] for line in logged] == [response.headers["x-request-id"]]
    assert logged[0]["error"] == "the card fell off the bus"


def test_a_client_that_leaves_while_its_zip_is_written(model: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """The member that is being packed is packed to its end by its thread; nothing else is said of it."""
    packing, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    class Slow(zipfile.ZipFile):
        def writestr(self, item: zipfile.ZipInfo, body: bytes, **more: int) -> None:  # type: ignore[override]
            with self.open(item, "w") as member:
                packing.set()
                assert go_on.wait(LONGEST)
                member.write(body)
            ended.set()

    async def story() -> None:
        handler = await opened(Settings(bundle=model.bundle.folder, provider="cpu", threads=1))
        monkeypatch.setattr(zipfile, "ZipFile", Slow)
        pieces = batch._zip(BatchHandler(handler), [Sent("a.png", lambda: ALL["folder/0.png"])], MANY_KINDS[2], Query())
        work = asyncio.ensure_future(anext(pieces))
        await asyncio.to_thread(packing.wait, LONGEST)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        await pieces.aclose()
        go_on.set()
        assert await asyncio.to_thread(ended.wait, LONGEST)
        handler.close()

    asyncio.run(story())


@pytest.fixture
def desk_settings(tmp_path: Path) -> Settings:
    made = tiny_onnx.write(tmp_path / "bundle")
    return Settings(bundle=made.folder, provider="cpu", threads=1, concurrency=2, queue=0)


async def opened(settings: Settings) -> SegmentHandler:
    models = ModelManager(settings)
    models.current = loader.open_runtime(settings)
    return SegmentHandler(settings, models)


def test_an_answer_goes_out_before_later_images_are_looked_at(desk_settings: Settings) -> None:
    """In one process: no more images are begun than may be at work, and the first answer waits for none of the others."""
    begun: list[int] = []
    gate = threading.Event()

    def load(number: int) -> bytes:
        begun.append(number)
        assert number == 0 or gate.wait(30)
        return ALL["folder/0.png"]

    async def go() -> list[bool]:
        handler = await opened(desk_settings)
        sent = [Sent(str(i), lambda i=i: load(i)) for i in range(8)]
        found, seen = BatchHandler(handler).each(sent, one("mask"), Query()), []
        seen.append(await anext(found))
        assert len(begun) <= 2
        gate.set()
        for taken in range(1, 8):
            seen.append(await anext(found))
            assert len(begun) <= taken + 2
        await found.aclose()
        handler.close()
        return [isinstance(answer, Problem) for answer in seen]

    assert asyncio.run(go()) == [False] * 8
    assert sorted(begun) == list(range(8))


def test_a_full_house_is_waited_for(desk_settings: Settings) -> None:
    """Two calls of many images want four places; there are two, and no queue: all images are answered all the same."""

    async def go() -> list[object]:
        handler = await opened(desk_settings)
        many = BatchHandler(handler)
        sent = [Sent(str(i), lambda: ALL["folder/1.jpeg"]) for i in range(6)]

        async def call() -> list[object]:
            return [answer async for answer in many.each(sent, one("mask"), Query())]

        found = await asyncio.gather(call(), call())
        handler.close()
        return [answer for part in found for answer in part]

    found = asyncio.run(go())
    assert len(found) == 12
    assert not [answer for answer in found if isinstance(answer, Problem)]
    assert open_bundle(desk_settings.bundle).manifest.id == found[0].bundle
