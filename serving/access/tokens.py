"""Bearer tokens by role, from the settings and from files that are read again when they change."""

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import SecretStr
from starlette.requests import Request

from serving.http.requests import Problem
from serving.settings import PREFIX, Settings, SettingsError, token_lines
from serving.telemetry import metrics

Role = Literal["anyone", "caller", "operator"]  # who may use a route; an operator may do what a caller may
LOOK_EVERY_S = 1.0  # between two looks at a file, so that requests do not wait for a slow disk one by one
_LARGEST_FILE = 64 << 10


class TokenFile:
    """The tokens in a file, one a line; a file that is exchanged or rewritten counts within `LOOK_EVERY_S` seconds.

    A new content that cannot be read leaves the tokens as they were, and is logged once: an accident with a file neither
    opens the service nor closes it.

    Raises:
        SettingsError: there is no good file at the start; the message names it.
    """

    def __init__(self, path: Path, variable: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path.absolute()
        self._variable = variable
        self._clock = clock
        self._looked_at = clock()
        self._stamp = self._look()
        self._tokens = self._read()

    def tokens(self) -> list[str]:
        """The tokens that count now."""
        now = self._clock()
        if now - self._looked_at < LOOK_EVERY_S:
            return self._tokens

        self._looked_at = now
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            self._read_again()
        return self._tokens

    def _read_again(self) -> None:
        try:
            self._tokens = self._read()
        except SettingsError as error:
            metrics.event("tokens-refused", error=str(error), reason="the tokens before it still count")
        else:
            metrics.event("tokens-changed", file=str(self._path), tokens=len(self._tokens))

    def _look(self) -> tuple[int, ...] | None:
        """What changes with the content: also by renaming, and where Kubernetes moves a link to another folder."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _read(self) -> list[str]:
        try:
            with self._path.open("rb") as file:
                content = file.read(_LARGEST_FILE + 1)
        except OSError as error:
            reason = f"{self._variable}: {self._path} cannot be read ({error.strerror}); write one token a line there"
            raise SettingsError(reason) from error
        if len(content) > _LARGEST_FILE:
            raise SettingsError(f"{self._variable}: {self._path} has over {_LARGEST_FILE} bytes; is it the right file?")
        try:
            return token_lines(content.decode("utf-8", "replace"))
        except ValueError as error:
            raise SettingsError(f"{self._variable}: {self._path} {error}") from error


class _Source:
    """The tokens of one role: those of its variable and those of its file."""

    def __init__(self, given: SecretStr | None, path: Path | None, variable: str) -> None:
        self._given = given.get_secret_value().split("\n") if given else []
        self._file = TokenFile(path, variable) if path else None

    def __bool__(self) -> bool:
        return bool(self._given) or self._file is not None

    def tokens(self) -> list[str]:
        return [*self._given, *(self._file.tokens() if self._file else ())]


class Roles:
    """Checks what a request's token may do. One may be made anywhere; each looks at the files itself.

    Raises:
        SettingsError: a file of tokens is absent or has none.
    """

    def __init__(self, settings: Settings) -> None:
        self._callers = _Source(settings.token, settings.token_file, PREFIX + "TOKEN_FILE")
        self._operators = _Source(settings.change_token, settings.change_token_file, PREFIX + "CHANGE_TOKEN_FILE")

    def check(self, request: Request, role: Role) -> None:
        """Raises Problem: 401 without a token that the service knows, 403 with one that may not do this."""
        if role == "caller":
            self._check_caller(request)
        elif role == "operator":
            self._check_operator(request)

    def _check_caller(self, request: Request) -> None:
        if self._callers and not _carries(request, [*self._callers.tokens(), *self._operators.tokens()]):
            raise _unauthorized()

    def _check_operator(self, request: Request) -> None:
        source = self._operators or self._callers
        if not source:
            raise Problem(
                403,
                "no-token",
                "changing models needs a token and this service has none; set MARGINALIA_CHANGE_TOKEN (or MARGINALIA_TOKEN) "
                "and start it again",
            )
        if _carries(request, source.tokens()):
            return
        if _carries(request, self._callers.tokens()):
            raise Problem(
                403,
                "not-for-changes",
                "this token may ask and not change models; send one of MARGINALIA_CHANGE_TOKEN or its file",
            )
        raise _unauthorized()


def _carries(request: Request, tokens: Sequence[str]) -> bool:
    """Whether its bearer token is one of `tokens`, compared with all of them, and in constant time over digests, so that
    the time depends neither on the length nor on which it is."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    got = _digest(given.strip().encode("utf-8", "surrogateescape"))
    same = [hmac.compare_digest(digest, got) for digest in _digests(tokens)]
    return any(same) and scheme.lower() == "bearer"


def _digests(tokens: Iterable[str]) -> list[bytes]:
    return [_digest(token.encode()) for token in tokens]


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _unauthorized() -> Problem:
    return Problem(
        401,
        "unauthorized",
        "send 'Authorization: Bearer <token>' with this service's token",
        {"WWW-Authenticate": "Bearer"},
    )
