"""What the soak sends: every kind of answer, and everything that must be refused, each with what a right server says."""

import io
import math
import random
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from benchmarks.support.load import Call
from benchmarks.support.wire import request

BOUNDARY = "soak-4f1d"
IMAGE = frozenset({200})


@dataclass(frozen=True)
class Weighted:
    """A call and how often it is picked."""

    call: Call
    weight: float


def picture(height: int, width: int, kind: str, seed: int = 0) -> bytes:
    """A smooth image with some noise, encoded as `kind`."""
    source = np.random.default_rng(seed)
    coarse = Image.fromarray(source.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def noise(size: int) -> bytes:
    """A square PNG of noise, which does not compress, with at least `size` bytes."""
    side = math.isqrt(size // 3) + 1
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """The start of a PNG that says it is `side` x `side`: what a server must refuse by its header."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(head)) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def form(*parts: bytes) -> bytes:
    """multipart/form-data with a file field `image` for each part."""
    pieces = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="{i}"\r\n\r\n'.encode()
        + part
        + b"\r\n"
        for i, part in enumerate(parts)
    ]
    return b"".join(pieces) + f"--{BOUNDARY}--\r\n".encode()


def mix(
    token: str, max_body: int, max_pixels: int, views: Mapping[str, str], batch: bool, spooled: int = 0
) -> list[Weighted]:
    """All calls. `views` are the answers on offer, view -> media type; `batch`: whether POST /v1/segment/batch is there.

    `max_body` is the largest body that is taken; with `spooled`, an image of at least so many bytes, more than an ordinary
    one may have, is sent as well.
    Weights are chosen so that about three quarters of the requests are images to be answered.
    """
    good, multipart = {"authorization": f"Bearer {token}"}, f"multipart/form-data; boundary={BOUNDARY}"
    small, middle, large = picture(64, 96, "PNG"), picture(360, 480, "JPEG", 1), picture(1080, 1920, "JPEG", 2)
    found: list[Weighted] = []

    def add(weight: float, kind: str, sent: bytes, *fine: int, cut: int | None = None) -> None:
        found.append(Weighted(Call(kind, sent, frozenset(fine or (200,)), cut=cut), weight))

    def post(body: bytes, path: str = "/v1/segment", **headers: str) -> bytes:
        return request("POST", path, body, **({"content_type": "application/octet-stream"} | good | headers))

    for view, media in views.items():
        for name, data, weight in (("small", small, 6.0), ("middle", middle, 6.0), ("large", large, 0.5)):
            add(weight / len(views), f"{view} {name}", post(data, f"/v1/segment?view={view}", accept=media))
    if spooled:
        add(0.1, "spooled, in bands", post(noise(spooled), "/v1/segment?resolution=full"))
        add(0.1, "spooled, ordinary", post(noise(spooled)), 413)
    add(1.0, "form", post(form(middle), content_type=multipart))
    asked = ("classes=0&min_confidence=0.5", "size=100x80", "size=model&view=json", "resolution=full")
    for query in asked:
        add(0.5, f"?{query}", post(middle, f"/v1/segment?{query}"))
    if batch:
        two = post(form(small, middle), "/v1/segment/batch", content_type=multipart, accept="application/jsonl")
        one_bad = post(form(small, b"no image"), "/v1/segment/batch", content_type=multipart, accept="application/zip")
        add(0.5, "batch", two)
        add(0.3, "batch, one bad", one_bad)
    for path in ("/v1/model", "/v1/openapi.json", "/metrics", "/readyz", "/"):
        add(0.1, f"GET {path}", request("GET", path, **good))
    add(0.4, "no image", post(b"not an image at all"), 400)
    add(0.4, "cut-off JPEG", post(middle[: len(middle) // 2]), 400)
    add(0.2, "empty", post(b""), 400)
    add(0.2, "SVG", post(b"<svg xmlns='http://www.w3.org/2000/svg'/>", content_type="image/svg+xml"), 400, 415)
    add(0.3, "bomb", post(bomb(max_pixels)), 400, 422)
    add(0.2, "oversize", post(bytes(max_body + 1)), 413)
    add(0.2, "JSON", post(b"{}", content_type="application/json"), 415)
    add(0.2, "bad query", post(small, "/v1/segment?view=everything"), 400)
    add(0.2, "not acceptable", post(small, accept="text/html"), 406)
    add(0.2, "nowhere", request("GET", "/v1/nothing", **good), 404)
    add(0.2, "wrong method", request("DELETE", "/v1/segment", **good), 405)
    add(0.3, "wrong token", post(small, authorization="Bearer " + token[::-1]), 401)
    add(0.3, "no token", request("POST", "/v1/segment", small, content_type="image/png"), 401)
    whole = post(middle)
    add(0.3, "hung up in the head", whole, cut=40)
    add(0.3, "hung up in the body", whole, cut=len(whole) // 2)
    add(0.3, "hung up before the answer", whole, cut=len(whole))
    return found


def picker(calls: list[Weighted], seed: int) -> Callable[[int], Call]:
    """The call for the i-th request: drawn by weight, the same for the same seed."""
    source = random.Random(seed)
    weights = [item.weight for item in calls]
    return lambda i: source.choices(calls, weights)[0].call
