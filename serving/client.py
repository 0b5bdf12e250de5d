"""A client of the service, for a program: images in, NumPy masks and areas per class out.

    from client import Client                                # or: from serving.client import Client

    with Client("http://127.0.0.1:3000") as service:
        found = service.segment("image.jpg")                 # or bytes, a NumPy array, a Pillow image
        print(found.bundle, {item.name: item.share for item in found.classes}, found.mask_HW.shape)

This file needs httpx, numpy and Pillow and nothing of the project: copy it wherever a client is wanted.
`AsyncClient` has the same methods to await. A call is repeated after a 429, 502, 503, 504 or a broken connection, never
sooner than Retry-After says, with growing pauses and jitter, until `deadline_s` is over (segmenting changes nothing, so
that is harmless); no other status is repeated.
"""

import asyncio
import email.utils
import io
import json
import os
import random
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import anyio  # comes with httpx
import httpx
import numpy as np
from anyio import to_thread
from numpy.typing import NDArray
from PIL import Image

IGNORE = 255  # the id of pixels that belong to no class that was asked for
FIRST_PAUSE_S, LONGEST_PAUSE_S, CONNECT_S = 0.2, 5.0, 5.0
TOGETHER, TOGETHER_BYTES = 16, 8 << 20  # most in one call of `batch`, unless one image alone is larger
_BROKEN = (httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError)
_AGAIN = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.TimeoutException)
_RETRIED = (
    429,
    502,
    503,
    504,
)  # too many requests, and a service or its proxy that is full, slow or being started again
_TOO_MUCH = (413, 422)  # the images of one call are too large, or too many, together
BREAKS = 3  # times that a call's connection breaks without an answer before its images are taken for the reason
# What `encode` raises, and what Pillow does of a broken or huge file that it opened and reads only now.
_UNREADABLE = (OSError, TypeError, ValueError, SyntaxError, ArithmeticError, EOFError, Image.DecompressionBombError)
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_WITH_ALPHA = {"PA": "RGBA", "RGBa": "RGBA", "La": "LA"}

T = TypeVar("T")
Query = Mapping[str, str | float]
Input = str | Path | bytes | bytearray | memoryview | NDArray[Any] | Image.Image


class ServiceError(Exception):
    """The service refused, or did not answer.

    Attributes:
        code: the service's kebab-case reason; or "unreachable", "deadline", "bad-answer" (not this service's words), and
            "unreadable" for an item of a batch that could not be sent.
        message: what is wrong and what to do. request_id: to quote when reporting the error. status: HTTP, None without answer.
    """

    def __init__(self, code: str, message: str, request_id: str | None = None, status: int | None = None) -> None:
        super().__init__(code, message, request_id, status)
        self.code, self.message, self.request_id, self.status = code, message, request_id, status

    def __str__(self) -> str:
        about = [f"status {self.status}"] if self.status else []
        about += [f"request {self.request_id}"] if self.request_id else []
        return f"{self.code}: {self.message}" + (f" ({', '.join(about)})" if about else "")


@dataclass(frozen=True)
class ClassArea:
    """One class: its area in pixels and as a share 0..1 of the image; mean confidence 0..1, None without pixels."""

    id: int
    name: str
    color: tuple[int, int, int]
    pixels: int
    share: float
    confidence: float | None


@dataclass(frozen=True)
class Answer:
    """One answer as it came: its bytes and what its headers say. `timings`: milliseconds by phase."""

    body: bytes
    media_type: str
    bundle: str
    request_id: str
    timings: Mapping[str, float]


@dataclass(frozen=True)
class Segmentation:
    """`mask_HW` uint8 class ids (255: none of them), all classes in id order, mean confidence 0..1, and, if it was asked
    for, `confidence_HW` uint8 (0..255 = 0..1). `bundle` names the model; `timings` milliseconds by phase."""

    mask_HW: NDArray[np.uint8]
    classes: tuple[ClassArea, ...]
    confidence: float
    confidence_HW: NDArray[np.uint8] | None
    bundle: str
    request_id: str
    timings: Mapping[str, float]


@dataclass(frozen=True)
class BatchItem:
    """What became of image `index` of a batch: a result or an error."""

    index: int
    result: Segmentation | None
    error: ServiceError | None


def encode(image: Input) -> bytes:
    """What is sent for an image: files and bytes as they are, arrays and Pillow images as PNG.

    A Pillow image is sent as its pixels stand: the mask fits `np.asarray(image)`, whatever its EXIF orientation.

    Raises:
        OSError: the file cannot be read. TypeError, ValueError: an array that is not uint8 H x W or H x W x 3, or a Pillow
            image of a mode (I, F, LAB) that the service refuses in files too, for its values have no stated range.
    """
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"an image array is uint8 (0..255), not {image.dtype}")
        if image.ndim not in (2, 3) or 0 in image.shape or (image.ndim == 3 and image.shape[2] != 3):
            raise ValueError(f"an image array is H x W or H x W x 3 (RGB), not {image.shape}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"an image is a path, bytes, a NumPy array or a Pillow image, not {type(image).__name__}")
    buffer = io.BytesIO()
    _as_png_mode(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _as_png_mode(image: Image.Image) -> Image.Image:
    """The same pixels in a mode that PNG has. Raises ValueError where there is none."""
    if image.mode in _PNG_MODES:
        return image
    if image.mode.startswith("I;16"):  # 16 bits in another byte order
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode in ("I", "F", "LAB") or ";" in image.mode:
        raise ValueError(
            f"pixels of kind {image.mode} have no stated range; convert the image to 8 or 16 bits per channel"
        )
    return image.convert(_WITH_ALPHA.get(image.mode, "RGB"))


def unpack_counts(text: str) -> list[int]:
    """COCO's text form of run lengths: 5 bits a character, from the fourth on relative to the one two before."""
    counts: list[int] = []
    value = shift = 0
    for character in text.encode("ascii"):
        five = character - 48
        value |= (five & 31) << shift
        shift += 5
        if not five & 32:
            if five & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def read_segmentation(facts: Mapping[str, Any], request_id: str, timings: Mapping[str, float]) -> Segmentation:
    """The service's JSON answer as arrays. Raises LookupError, TypeError, ValueError or OverflowError
    where it is no such answer."""
    height, width = int(facts["height"]), int(facts["width"])
    flat = np.full(height * width, IGNORE, np.uint8)  # run lengths go down the columns
    classes = []
    for row in facts["classes"]:
        ends = np.cumsum(unpack_counts(row["rle"]["counts"])).tolist()
        if not ends or ends[-1] != flat.size:
            raise ValueError(f"the run lengths of class {row['name']!r} do not fill {height} x {width}")
        for start, end in zip(ends[::2], ends[1::2], strict=False):
            flat[start:end] = row["id"]
        red, green, blue = row["color"]
        area = ClassArea(row["id"], row["name"], (red, green, blue), row["pixels"], row["share"], row["confidence"])
        classes.append(area)
    mask_HW = np.ascontiguousarray(flat.reshape(width, height).T)
    return Segmentation(mask_HW, tuple(classes), facts["confidence"], None, facts["bundle"], request_id, timings)


def read_problem(response: httpx.Response) -> ServiceError:
    """The error of an answer that is not 200; of a proxy's words as well."""
    try:
        detail = response.json()["error"]
        return ServiceError(detail["code"], detail["message"], detail["request_id"], response.status_code)
    except (ValueError, KeyError, TypeError):
        reason = f"HTTP {response.status_code} without this service's error body: {response.text[:200]!r}"
        return ServiceError("bad-answer", reason, response.headers.get("x-request-id"), response.status_code)


def retry_after_s(response: httpx.Response, now: float) -> float:
    """Seconds that Retry-After asks for (RFC 9110, 10.2.3: a number or a date); 0 without one."""
    stated = response.headers.get("retry-after", "").strip()
    if stated.isascii() and stated.isdigit():
        return float(stated)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(stated).timestamp() - now)
    except ValueError:
        return 0.0


class Retry:
    """How long one call may go on, and when it tries again."""

    def __init__(self, deadline_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._deadline_s, self._clock, self._end, self._tries = deadline_s, clock, clock() + deadline_s, 0

    def late(self) -> ServiceError:
        """What to raise when time is over."""
        return ServiceError("deadline", f"no answer within {self._deadline_s:g} seconds; allow more, or send less")

    def timeout(self) -> httpx.Timeout:
        """Of the next try. Raises ServiceError "deadline"."""
        if (left := self._end - self._clock()) <= 0:
            raise self.late()
        return httpx.Timeout(left, connect=min(left, CONNECT_S))

    def pause(self, failed: httpx.Response | httpx.TransportError) -> float:
        """Seconds to wait before the next try; raises ServiceError where trying again is no use or too late."""
        # Callers who failed together must not come back together: hence the random part.
        wait = random.uniform(0.5, 1.0) * min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._tries, 10))
        self._tries += 1
        if isinstance(failed, httpx.Response):
            wait += retry_after_s(failed, time.time())
        if self._clock() + wait < self._end and (isinstance(failed, Exception) or failed.status_code in _RETRIED):
            return wait
        if isinstance(failed, httpx.Response):
            raise read_problem(failed)
        if isinstance(failed, httpx.ReadTimeout):
            raise self.late() from failed
        raise ServiceError("unreachable", f"{type(failed).__name__}: {failed}; is it running?") from failed


def _read_answer(response: httpx.Response) -> Answer:
    head = response.headers
    timed = re.findall(r"([\w-]+)\s*;\s*dur=([\d.]+)", head.get("server-timing", ""))
    return Answer(
        response.content,
        head.get("content-type", ""),
        head.get("x-bundle-id", ""),
        head.get("x-request-id", ""),
        {name: float(value) for name, value in timed},
    )


def _readable(answer: Answer, read: Callable[[], T]) -> T:
    try:
        return read()
    except (LookupError, TypeError, ValueError, ArithmeticError, OSError) as error:
        raise ServiceError("bad-answer", f"no answer of this service: {error!r}", answer.request_id, 200) from error


def _read_body(answer: Answer) -> Segmentation:
    return _readable(answer, lambda: read_segmentation(json.loads(answer.body), answer.request_id, answer.timings))


def _read_grey(answer: Answer) -> NDArray[np.uint8]:
    return _readable(answer, lambda: np.array(Image.open(io.BytesIO(answer.body)).convert("L")))


def _groups(images: Iterable[Input]) -> Iterator[dict[int, bytes] | BatchItem]:
    """Index -> encoded image, as many together as one call of `batch` takes; nothing is read ahead of need.

    An image that cannot be encoded is an item with an error, and costs no other.
    """
    group: dict[int, bytes] = {}
    for index, image in enumerate(images):
        try:
            data = encode(image)
        except _UNREADABLE as error:
            reason = f"{error}" if isinstance(error, OSError | TypeError | ValueError) else repr(error)
            yield BatchItem(index, None, ServiceError("unreadable", f"not sent: {reason}"))
            continue
        if group and (len(group) == TOGETHER or sum(map(len, group.values())) + len(data) > TOGETHER_BYTES):
            yield group
            group = {}
        group[index] = data
    if group:
        yield group


def _halves(group: dict[int, bytes]) -> list[dict[int, bytes]]:
    """A group in two, the second one first, as a stack has it."""
    items = list(group.items())
    middle = len(items) // 2
    return [dict(items[middle:]), dict(items[:middle])]


def _read_line(line: str, sent: Sequence[int], left: dict[int, bytes], head: httpx.Headers) -> BatchItem:
    """One line of a batch's answer; takes its image off `left`. Raises ServiceError "bad-answer"."""
    request_id = head.get("x-request-id", "")
    try:
        facts = json.loads(line)
        index = sent[facts["index"]]
        del left[index]
        if detail := facts.get("error"):
            return BatchItem(index, None, ServiceError(detail["code"], detail["message"], request_id))
        return BatchItem(index, read_segmentation(facts["answer"], request_id, {}), None)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ServiceError("bad-answer", f"no line of this service: {error!r}", request_id, 200) from error


def _refusal(failed: httpx.Response | httpx.TransportError) -> ServiceError:
    """Of an image that was sent alone, to a service that is there."""
    if isinstance(failed, httpx.Response):
        return read_problem(failed)
    reason = (
        f"the connection broke {BREAKS} times on this image alone ({type(failed).__name__}), and the service is there"
    )
    return ServiceError("unreachable", f"{reason}; send it smaller")


_CUT = httpx.RemoteProtocolError("the answer ended before all images were reported")


def _authorization(token: str | None) -> dict[str, str]:
    """The header for a token; none without one. Raises ValueError, which does not repeat it."""
    if token is None:
        return {}
    plain = token.strip()  # a secret in a file ends in a newline
    if not plain or not plain.isascii() or not plain.isprintable():
        raise ValueError("the token is empty or has other than printable ASCII characters")
    return {"Authorization": f"Bearer {plain}"}


class AsyncClient:
    """Speaks to the service at `url`, under asyncio or trio; use it in an `async with`, or `aclose` it.

    Args:
        token: sent as `Authorization: Bearer`; without one that of MARGINALIA_TOKEN, unless `trust_env` is False.
        deadline_s: longest time of one call, its retries and pauses included.
        options: for `httpx.AsyncClient`, such as `verify` or `proxy`.

    Every method raises ServiceError; those that take images also what `encode` raises. `query` is passed on as
    /v1/openapi.json describes it, such as `classes="road,sky"`, `min_confidence=0.5`, `size="model"`, `resolution="full"`.
    Images are encoded and masks unpacked in threads.
    """

    def __init__(self, url: str, token: str | None = None, *, deadline_s: float = 60.0, **options: Any) -> None:
        if token is None and options.get("trust_env", True):
            given = os.environ.get("MARGINALIA_TOKEN", "").strip()
            token = given.partition("\n")[0] or None  # of several, one a line, as the service takes them, the first
        self._deadline_s = deadline_s
        self._http = httpx.AsyncClient(base_url=url, headers=_authorization(token), **options)

    async def segment(self, image: Input, *, confidence: bool = False, **query: str | float) -> Segmentation:
        """Segment one image; with `confidence` its `confidence_HW` too (a second request, of the same bundle)."""
        with self._deadline() as retry:
            data = await to_thread.run_sync(encode, image)
            while True:
                answer = await self._ask(retry, data, query | {"view": "json"})
                result = await to_thread.run_sync(_read_body, answer)
                if not confidence:
                    return result
                shade = await self._ask(retry, data, query | {"view": "confidence"})
                if shade.bundle == result.bundle:  # else the model was changed in between: both again
                    return replace(result, confidence_HW=await to_thread.run_sync(_read_grey, shade))

    async def answer(self, image: Input, view: str = "mask", *, accept: str = "*/*", **query: str | float) -> Answer:
        """The service's own bytes: `view` mask, json, geojson, overlay or confidence; `accept` image/jpeg for that."""
        with self._deadline() as retry:
            data = await to_thread.run_sync(encode, image)
            return await self._ask(retry, data, query | {"view": view}, accept)

    async def model(self) -> dict[str, Any]:
        """The model card: bundle, classes, metrics, origin."""
        with self._deadline() as retry:
            answer = await self._send(retry, "GET", "/v1/model")
            return _readable(answer, lambda: dict(json.loads(answer.body)))

    async def batch(self, images: Iterable[Input], **query: str | float) -> AsyncGenerator[BatchItem, None]:
        """Segment many, a few at a time, each reported as soon as it is done.

        One that cannot be read, that is too large or that the service refuses is an item with `error`; the others are
        answered. `deadline_s` holds from one item to the next. A call that breaks goes on with the images not yet answered.
        """
        groups = _groups(images)
        while (group := await to_thread.run_sync(next, groups, None)) is not None:
            if isinstance(group, BatchItem):
                yield group
                continue
            pending = [group]
            while pending:
                left = pending.pop()
                async with aclosing(self._together(left, query)) as items:
                    async for item in items:
                        yield item
                if left:  # too much for one call, or one of them breaks it
                    pending += _halves(left)

    async def _together(self, left: dict[int, bytes], query: Query) -> AsyncGenerator[BatchItem, None]:
        """What became of images sent in one call, each taken off `left`; several that cannot be sent together stay in it."""
        retry, breaks = Retry(self._deadline_s), 0
        while left:
            failed: httpx.Response | httpx.TransportError = _CUT
            form = [("image", (str(index), data)) for index, data in left.items()]
            asked = self._http.stream(
                "POST", "/v1/segment/batch", params=query, files=form,
                headers={"Accept": "application/jsonl"}, timeout=retry.timeout(),
            )  # fmt: skip
            try:
                async with asked as response:
                    if response.status_code == 200:
                        sent = list(left)
                        async for line in response.aiter_lines():
                            yield await to_thread.run_sync(_read_line, line, sent, left, response.headers)
                            retry, breaks = Retry(self._deadline_s), 0
                    else:
                        await response.aread()
                        failed = response
            except _AGAIN as error:
                failed = error

            # A service that refuses a body early closes before all was sent, and its words are often lost on the way.
            breaks += isinstance(failed, _BROKEN)
            refused = isinstance(failed, httpx.Response) and failed.status_code in _TOO_MUCH
            if left and (refused or (breaks >= BREAKS and await self._is_there(retry))):
                if len(left) == 1:
                    yield BatchItem(left.popitem()[0], None, _refusal(failed))
                return
            if left:
                await anyio.sleep(retry.pause(failed))

    async def _is_there(self, retry: Retry) -> bool:
        """Whether the service answers a small request."""
        try:
            return (await self._http.get("/livez", timeout=retry.timeout())).status_code < 500
        except _AGAIN:
            return False

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @contextmanager
    def _deadline(self) -> Iterator[Retry]:
        retry = Retry(self._deadline_s)
        with anyio.move_on_after(self._deadline_s):
            yield retry
            return
        raise retry.late()

    async def _ask(self, retry: Retry, data: bytes, query: Query, accept: str = "*/*") -> Answer:
        headers = {"Accept": accept, "Content-Type": "application/octet-stream"}
        return await self._send(retry, "POST", "/v1/segment", params=query, content=data, headers=headers)

    async def _send(self, retry: Retry, method: str, path: str, **request: Any) -> Answer:
        while True:
            failed: httpx.Response | httpx.TransportError
            try:
                failed = await self._http.request(method, path, timeout=retry.timeout(), **request)
                if failed.status_code == 200:
                    return _read_answer(failed)
            except _AGAIN as error:
                failed = error
            await anyio.sleep(retry.pause(failed))


async def _next(items: AsyncGenerator[T, None]) -> T | None:
    return await anext(items, None)


class Client:
    """`AsyncClient` for programs that are not asynchronous: the same arguments, answers and errors, in a `with`.

    An event loop in a daemon thread does the work, so one client may be shared between threads (not across a fork).
    """

    def __init__(self, url: str, token: str | None = None, *, deadline_s: float = 60.0, **options: Any) -> None:
        self._client = AsyncClient(url, token, deadline_s=deadline_s, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="segment-client", daemon=True)
        self._thread.start()

    def segment(self, image: Input, *, confidence: bool = False, **query: str | float) -> Segmentation:
        """See `AsyncClient.segment`."""
        return self._wait(self._client.segment(image, confidence=confidence, **query))

    def answer(self, image: Input, view: str = "mask", *, accept: str = "*/*", **query: str | float) -> Answer:
        """See `AsyncClient.answer`."""
        return self._wait(self._client.answer(image, view, accept=accept, **query))

    def model(self) -> dict[str, Any]:
        """See `AsyncClient.model`."""
        return self._wait(self._client.model())

    def batch(self, images: Iterable[Input], **query: str | float) -> Iterator[BatchItem]:
        """See `AsyncClient.batch`."""
        items = self._client.batch(images, **query)
        try:
            while item := self._wait(_next(items)):
                yield item
        finally:
            self._wait(items.aclose())

    def close(self) -> None:
        """Close the connections and end the thread."""
        if self._thread.is_alive():
            self._wait(self._client.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        if not self._thread.is_alive():
            work.close()
            raise RuntimeError("this client is closed, or from before a fork; make one here")
        done = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return done.result()
        except BaseException:  # also an interrupt: what was begun must not go on
            done.cancel()
            raise
