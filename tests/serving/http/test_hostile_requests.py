"""Bodies and headers that no honest client sends. Clear 4xx, flat memory, nothing fetched."""

import json
import re
import select
import socket
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support import live_server
from tests.support.image_files import png, save
from tests.support.live_server import Server, error

RAW = {"Content-Type": "application/octet-stream"}
PICTURE = save(Image.fromarray(np.random.default_rng(4).integers(0, 256, (24, 32, 3), dtype=np.uint8)))
LIMIT = 2 << 20  # what the shared server is started with


def talk(server: Server, request: bytes, more: Iterator[bytes] | None = None, seconds: float = 10) -> bytes:
    """Raw bytes over a socket, for what no HTTP client would send; reads until the server closes or has answered."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as link:
        link.sendall(request)
        if more is not None:
            for piece in more:
                try:
                    link.sendall(piece)
                except (BrokenPipeError, ConnectionResetError):
                    break
                if select.select([link], [], [], 0)[0]:
                    break  # an answer before the end: an honest client stops and reads
        answer = b""
        while b"}}" not in answer and b"Invalid" not in answer:
            try:
                piece = link.recv(65536)
            except (TimeoutError, ConnectionResetError):
                break
            if not piece:
                break
            answer += piece
        return answer


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def test_a_stated_length_over_the_limit_is_refused_unread(server: Server) -> None:
    head = f"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {10**12}\r\n\r\n"
    answer = talk(server, head.encode())  # not one byte of the body is sent
    assert status(answer) == 413
    assert b"body-too-large" in answer


def test_expect_continue_is_not_waved_through(server: Server) -> None:
    head = (
        "POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        "Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"
    )
    answer = talk(server, head.encode())
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("size", [LIMIT + 1, 3 * LIMIT])
def test_too_large_with_and_without_length(http: httpx.Client, size: int) -> None:
    body = PICTURE + bytes(size - len(PICTURE))
    stated = http.post("/v1/segment", content=body, headers=RAW)
    assert (stated.status_code, error(stated)) == (413, "body-too-large")
    chunked = http.post("/v1/segment", content=iter([body[i : i + 65536] for i in range(0, size, 65536)]), headers=RAW)
    assert (chunked.status_code, error(chunked)) == (413, "body-too-large")
    form = http.post("/v1/segment", files={"image": ("a.png", body)})
    assert (form.status_code, error(form)) == (413, "body-too-large")


def test_at_the_limit_is_taken(http: httpx.Client) -> None:
    """Trailing bytes after a PNG's end are no part of it."""
    body = PICTURE + bytes(LIMIT - len(PICTURE))
    assert http.post("/v1/segment", content=body, headers=RAW).status_code == 200
    assert http.post("/v1/segment", content=iter([body[:100], body[100:]]), headers=RAW).status_code == 200
    assert http.post("/v1/segment", files={"image": ("a.png", body)}).status_code == 200


def test_chunks_without_end_and_memory(server: Server) -> None:
    head = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"10000\r\n" + PICTURE + bytes(65536 - len(PICTURE)) + b"\r\n"

    def endless() -> Iterator[bytes]:
        for _ in range(3000):  # up to 190 MB, if anybody took it
            yield piece

    talk(server, head, endless())
    before = server.resident_mb()
    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda: answers.append(talk(server, head, endless()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.resident_mb() - before < 64
    assert all(b" 413 " in answer for answer in answers)
    with server.client() as http:
        assert http.post("/v1/segment", content=PICTURE, headers=RAW).status_code == 200


def test_a_lying_or_broken_off_body(server: Server, http: httpx.Client) -> None:
    short = (
        b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 500\r\n\r\n" + b"x" * 20
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
        link.sendall(short)
    for value in ("-5", "1e3", "٣", "9" * 40, "12, 13"):
        head = f"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {value}\r\n\r\n"
        assert 400 <= status(talk(server, head.encode())) < 500
    assert http.post("/v1/segment", content=PICTURE, headers=RAW).status_code == 200


def many_pages(pages: int) -> bytes:
    """A small TIFF of 10,000 pages, put together by hand: every directory but the last points to the next."""
    entries = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 1)]
    size = 2 + 12 * len(entries) + 4
    out = b"II*\x00" + (10).to_bytes(4, "little") + b"\x00\x00"
    for page in range(pages):
        out += len(entries).to_bytes(2, "little")
        for tag, value in entries:
            out += tag.to_bytes(2, "little") + b"\x03\x00\x01\x00\x00\x00" + value.to_bytes(4, "little")
        out += (10 + (page + 1) * size if page + 1 < pages else 0).to_bytes(4, "little")
    return out


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", (400, "empty")),
        (b"Just some text.", (400, "not-an-image")),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>", (415, "unsupported-format")),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", (415, "unsupported-format")),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", (415, "unsupported-format")),
        (b"GIF89a\x01\x00\x01\x00", (415, "unsupported-format")),
        (many_pages(10_000), (415, "animated")),
        (PICTURE[: len(PICTURE) // 2], (400, "truncated")),
        (PICTURE[:60] + b"\x00\x00" + PICTURE[62:], (400, "corrupt")),
        (save(Image.fromarray(np.zeros((5, 5), np.float32)), "TIFF"), (415, "unsupported-depth")),
    ],
    ids=["empty", "text", "svg", "eps", "pdf", "gif", "tiff-pages", "cut", "damaged", "float"],
)
def test_bodies_that_are_no_image_of_ours(http: httpx.Client, body: bytes, expected: tuple[int, str]) -> None:
    for headers in (RAW, {"Content-Type": "image/png"}):
        response = http.post("/v1/segment", content=body, headers=headers)
        assert (response.status_code, error(response)) == expected
    if body:
        form = http.post("/v1/segment", files={"image": ("x.png", body, "image/png")})
        assert (form.status_code, error(form)) == expected


@pytest.mark.parametrize(
    "kind",
    [
        None, "", "text/plain", "application/json", "video/mp4", "image", "multipart/mixed; boundary=a",
        "application/vnd.bentoml+pickle", "application/python-pickle", "application/x-python-serialize",
        "application/vnd.bentoml.pickled", "application/pickle", "text/html; image/png",
    ],
)  # fmt: skip
def test_content_types_that_are_refused(server: Server, http: httpx.Client, kind: str | None) -> None:
    request = http.build_request("POST", "/v1/segment", content=PICTURE)
    request.headers.pop("content-type", None)
    if kind is not None:
        request.headers["Content-Type"] = kind
    response = http.send(request)
    assert (response.status_code, error(response)) == (415, "unsupported-type")
    encoded = http.post("/v1/segment", content=PICTURE, headers=RAW | {"Content-Encoding": "gzip"})
    assert (encoded.status_code, error(encoded)) == (415, "unsupported-type")
    twice = http.post("/v1/segment", content=PICTURE, headers=[("Content-Type", "image/png")] * 2)
    assert (twice.status_code, error(twice)) == (415, "unsupported-type")


def test_bombs_and_strange_shapes(http: httpx.Client) -> None:
    bomb = png(19_000, 19_000, 1, 0, bytes(2375 * 19_000))
    response = http.post("/v1/segment", content=bomb, headers=RAW)
    assert (response.status_code, error(response)) == (422, "too-many-pixels")
    for size in ((1, 60_000), (60_000, 1), (1, 101)):
        line = save(Image.fromarray(np.zeros((*size, 3), np.uint8)))
        response = http.post("/v1/segment", content=line, headers=RAW)
        assert (response.status_code, error(response)) == (422, "bad-aspect")
    for size in ((1, 1), (2, 1), (1, 100)):
        tiny = save(Image.fromarray(np.zeros((*size, 3), np.uint8)))
        assert http.post("/v1/segment", content=tiny, headers=RAW).status_code == 200


@pytest.mark.parametrize(
    "query",
    [
        "?view=mask&view=mask", "?view=mask&view=json", "?view=../../etc/passwd", "?view=%00", "?view=mask%0d%0aX: 1",
        "?view=", "?view", "?View=mask", "?bundle=../x", "?..=1", "?%2e%2e%2f=1", "?view=" + "a" * 20_000,
        "?view=mask;x", "?view=%ff%fe", "?url=http://127.0.0.1:1/a.png",
    ],
)  # fmt: skip
def test_query_parameters(http: httpx.Client, query: str) -> None:
    response = http.post("/v1/segment" + query, content=PICTURE, headers=RAW)
    assert (response.status_code, error(response)) == (400, "bad-query")
    assert len(response.content) < 400  # a long value is not sent back


def test_an_unknown_parameter_is_named(http: httpx.Client) -> None:
    for query, said in (("sizes=3", "'sizes'; did you mean 'size'?"), ("x%1b=3", r"'x\x1b'; known: view, classes")):
        response = http.post("/v1/segment?" + query, content=PICTURE, headers=RAW)
        assert f"unknown query parameter {said}" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "form",
    [
        [],
        [("picture", ("a.png", PICTURE))],
        [("image", (None, "a string, no file"))],
        [("image", ("a.png", PICTURE)), ("image", ("b.png", PICTURE))],
        [("image", ("a.png", PICTURE)), ("other", (None, "1"))],
        [("image", ("../../a.png", PICTURE))],
    ],
    ids=["nothing", "wrong-name", "no-file", "twice", "extra", "dots"],
)
def test_forms(http: httpx.Client, form: list) -> None:
    headers = {} if form else {"Content-Type": "multipart/form-data; boundary=x"}
    content = {"files": form} if form else {"content": b"--x--\r\n"}
    response = http.post("/v1/segment", headers=headers, **content)
    assert (response.status_code, error(response)) == (400, "bad-multipart")


@pytest.mark.parametrize(
    "kind",
    ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "b" * 71,
     'multipart/form-data; boundary="x', "multipart/form-data; boundary=other"],
)  # fmt: skip
def test_form_boundaries(http: httpx.Client, kind: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + PICTURE + b"\r\n--x--\r\n"
    response = http.post("/v1/segment", content=body, headers={"Content-Type": kind})
    assert response.status_code == 400
    assert error(response) in ("bad-multipart", "empty")


def test_control_characters_in_a_file_name(http: httpx.Client) -> None:
    for name, wanted in ((b"a_b", 200), (b"a\x01b", 400), (b"a\x7f", 400)):
        head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="' + name + b'"\r\n\r\n'
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        assert http.post("/v1/segment", content=head + PICTURE + b"\r\n--x--\r\n", headers=kind).status_code == wanted


def test_a_form_of_dashes_does_not_stall(server: Server, http: httpx.Client) -> None:
    """CVE-2024-9056, CVE-2024-53981: bytes around the boundary that cost a parser a step each."""
    for body in (b"-" * 900_000, b"--x" + b"-" * 900_000, b"\r\n" * 450_000, b"--x\r\n" + b"A: b\r\n" * 100_000):
        response = http.post(
            "/v1/segment", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"}, timeout=20
        )
        assert response.status_code == 400


def test_headers(server: Server, http: httpx.Client) -> None:
    lines = {
        "huge": b"X-Long: " + b"a" * (1 << 20),
        "control": b"X-Odd: a\x01b\x00c",
        "accept": b"Accept: " + b"image/png," * 2000,
        "newline": b"X-Request-Id: a\rX: b",
    }
    for name, line in lines.items():
        head = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n" + line + b"\r\n"
        answer = talk(server, head + f"Content-Length: {len(PICTURE)}\r\n\r\n".encode() + PICTURE)
        assert 400 <= status(answer) < 500, name
    assert http.post("/v1/segment", content=PICTURE, headers=RAW).status_code == 200


def test_nothing_unescaped_reaches_the_log(server: Server, http: httpx.Client) -> None:
    marker = "f42marker"
    http.get(f"/v1/%0d%0a{{%22event%22:%22forged%22,%22x%22:%22{marker}%1b[31m%00%22}}")
    http.post("/v1/segment", content=PICTURE, headers=RAW | {"X-Request-Id": marker + "%0a", "User-Agent": marker})
    live_server.until(lambda: marker in server.log())
    lines = [line for line in server.log().splitlines() if marker in line]
    assert len(lines) == 1
    assert json.loads(lines[0])["event"] == "request"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", lines[0])
    assert server.events("forged") == []


def test_addresses_are_not_fetched(http: httpx.Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(1.0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        tries = [
            http.post("/v1/segment", params={"url": url}, content=PICTURE, headers=RAW),
            http.post("/v1/segment", params={"view": url}, content=PICTURE, headers=RAW),
            http.post("/v1/segment", content=url.encode(), headers=RAW),
            http.post("/v1/segment", content=url.encode(), headers={"Content-Type": "image/png"}),
            http.post("/v1/segment", json={"image": url, "url": url}),
            http.post("/v1/segment", data={"image": url, "url": url}),
            http.post("/v1/segment", files={"image": (None, url)}),
            http.post("/v1/segment", files={"image": (url, url.encode())}),
            http.post("/v1/segment", content=f'<svg><image href="{url}"/></svg>'.encode(), headers=RAW),
        ]
        assert all(400 <= response.status_code < 500 for response in tries)
        with pytest.raises(TimeoutError):
            listener.accept()
