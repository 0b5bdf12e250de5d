"""Valid requests with a few bytes changed, anywhere: no 5xx, no restart, no growing memory.

400 of them here; MARGINALIA_MUTATIONS=10000 for the full number.
"""

import os
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
from PIL import Image

from tests.support.image_files import save
from tests.support.live_server import Server, error

NUMBER = int(os.environ.get("MARGINALIA_MUTATIONS", "400"))
PICTURE = Image.fromarray(np.random.default_rng(43).integers(0, 256, (24, 32, 3), dtype=np.uint8))
BODIES = [save(PICTURE, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")]
BODIES += [
    save(PICTURE.quantize(16), "PNG"),
    save(PICTURE.convert("LA"), "PNG"),
    save(PICTURE, "TIFF", compression="jpeg"),
]
FORM = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n%s\r\n--b--\r\n'
HEAD = (
    b"POST /v1/segment?view=%s HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\nAccept: image/png, */*;q=0.5\r\n"
    b"X-Request-Id: a-1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
)


def valid(rng: random.Random) -> tuple[bytes, bytes]:
    """A request that is answered with 200: head and body."""
    body, kind = rng.choice(BODIES), b"image/png"
    if rng.random() < 0.3:
        body, kind = FORM % body, b"multipart/form-data; boundary=b"
    return HEAD % (rng.choice([b"mask", b"json", b"overlay"]), kind, len(body)), body


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: a byte, a bit, a piece cut out, doubled, moved or filled."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(changed) or 1), rng.choice([1, 2, 4, 16, 256])
        piece = changed[at : at + length]
        match rng.randrange(6):
            case 0 if piece:
                changed[at] = rng.randrange(256)
            case 1 if piece:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = piece
            case 4:
                changed[rng.randrange(len(changed) + 1) : 0] = piece
            case _:
                changed[at : at + length] = rng.choice([b"\x00", b"\xff", b"\x7f"]) * len(piece)
    return bytes(changed)


def ask(server: Server, request: bytes) -> bytes:
    """The answer, or nothing where the server rightly waits for more or hangs up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
        answer = b""
        try:
            link.sendall(request)
            link.settimeout(1.0)
            while piece := link.recv(65536):
                answer += piece
        except (TimeoutError, ConnectionError):
            return answer
        return answer


def test_mutated_requests(server: Server, http: httpx.Client) -> None:
    def one(seed: int) -> int:
        rng = random.Random(seed)
        head, body = valid(rng)
        if seed % 4:  # the body only, of the length that is stated: it reaches the decoders
            body = mutated(body, rng)
            head = HEAD % (b"mask", b"image/png", len(body)) if seed % 8 else head
        else:
            head = mutated(head, rng)
        answer = ask(server, head + body)
        return int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0

    def several(first: int, end: int) -> list[int]:
        with ThreadPoolExecutor(6) as pool:
            return list(pool.map(one, range(first, end)))

    for head, body in (valid(random.Random(seed)) for seed in range(20)):
        assert ask(server, head + body).startswith(b"HTTP/1.1 200"), head
    workers = server.workers()
    found = several(0, NUMBER // 2)
    before = server.resident_mb()
    found += several(NUMBER // 2, NUMBER)
    assert server.resident_mb() - before < 32
    assert server.workers() == workers
    assert max(found) < 500
    assert {200, 400} <= set(found)
    assert found.count(0) < NUMBER / 10
    assert server.events("internal-error") == []
    bad = http.post("/v1/segment", content=b"bad", headers={"Content-Type": "image/png"})
    assert (bad.status_code, error(bad)) == (400, "not-an-image")
