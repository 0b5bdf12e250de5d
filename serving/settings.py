"""What a person who runs the service can set: environment variables named MARGINALIA_*."""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_core import PydanticCustomError

from export.bundle.manifest import Precision, Provider
from export.runtime import cpu

PREFIX = "MARGINALIA_"
# What Kubernetes puts into every pod for a service called marginalia or marginalia-<name>: MARGINALIA_SERVICE_HOST,
# MARGINALIA_SERVICE_PORT[_<name>], MARGINALIA_PORT=tcp://..., MARGINALIA_PORT_3000_TCP[_ADDR|_PORT|_PROTO].
_KUBERNETES = re.compile(r"(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_KUBERNETES_PORT = re.compile(r"(\w+_)?PORT")
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class SettingsError(ValueError):
    """A MARGINALIA_* variable is unknown or wrong; the message names it and what to do."""


def _sendable(token: SecretStr) -> SecretStr:
    """Without the whitespace around it (a secret in a file ends in a newline); the rest has to pass through a header."""
    plain = token.get_secret_value().strip()
    if not plain or not plain.isascii() or not plain.isprintable():
        advice = "is empty or has other than printable ASCII characters; use such as `openssl rand -hex 32` prints"
        raise PydanticCustomError("token", advice)
    return SecretStr(plain)


class Settings(BaseModel):
    """Each field is the variable MARGINALIA_<FIELD>.

    `bundle` pins one folder; without it the service follows `champions`, the pointer file that the gate moves, looking
    every `poll_s` seconds. `provider` and `precision` name what must run; auto takes the fastest that parity admitted.
    `concurrency` requests are at work at once, `queue` more may wait, the rest get 503; so do those whose pixels or
    bytes would be more than `max_pixels_at_once` or `max_bodies_mb` under way. `max_batch` images of one size run
    together where they wait together; unset, that depends on the device.
    A body has `body_timeout_s`, the work after it `timeout_s`; bodies and answers go at `min_rate_kb` KiB a second at
    least. Of `max_connections`, those between two requests make room; a request's head has `head_timeout_s`.

    A candidate may be `max_slowdown` times as slow as the model it replaces, and have other classes only with
    `allow_class_change`; POST /v1/models/load takes one from below `bundles` (default: the folder that holds
    `champions/`) and gives up after `load_timeout_s`. `shadow`, a bundle below that folder, is run beside the champion on
    a `shadow_share` of the images. `statistics` is a folder for prediction statistics, written every `statistics_every_s`.
    Above `large_pixels`, and for resolution=full, an image is read, run and encoded in bands
    (`serving.http.large_images`) within
    `large_timeout_s`; up to `max_pixels`, but `max_whole_pixels` for kinds that must be decoded whole. Its body may have
    `max_large_body_mb`; what is over `max_body_mb` lies in a temporary file.
    A call of many images takes `many_images` of them and a body of `many_mb`; `many_calls` may be
    answered at a time, each within `many_timeout_s`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: Path | None = None
    champions: Path = Path("champions/champion.json")
    poll_s: Seconds = 2.0
    provider: Provider = "auto"
    precision: Precision = "auto"
    threads: Positive | None = None
    concurrency: Positive = Field(default_factory=lambda: cpu.cores() + 2)
    queue: Annotated[int, Field(ge=0)] = 32
    max_batch: Positive | None = None
    max_pixels_at_once: Positive = 100_000_000
    max_bodies_mb: Annotated[float, Field(gt=0)] = 256.0
    max_body_mb: Annotated[float, Field(gt=0)] = 32.0
    max_pixels: Positive = 250_000_000
    max_whole_pixels: Positive = 50_000_000
    large_pixels: Positive = 16_000_000
    max_large_body_mb: Annotated[float, Field(gt=0)] = 512.0
    large_timeout_s: Seconds = 300.0
    max_aspect: Annotated[float, Field(ge=1)] = 100.0
    many_images: Positive = 256
    many_mb: Annotated[float, Field(gt=0)] = 64.0
    many_calls: Positive = 2
    many_timeout_s: Seconds = 600.0
    body_timeout_s: Seconds = 15.0
    timeout_s: Seconds = 15.0
    min_rate_kb: Annotated[float, Field(gt=0)] = 16.0
    max_connections: Positive = 512
    head_timeout_s: Seconds = 10.0
    idle_timeout_s: Seconds = 75.0
    bundles: Path | None = None
    load_timeout_s: Seconds = 20.0
    allow_class_change: bool = False
    max_slowdown: Annotated[float, Field(ge=1)] = 3.0
    shadow: str | None = None
    shadow_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    statistics: Path | None = None
    statistics_every_s: Seconds = 60.0
    token: Annotated[SecretStr, AfterValidator(_sendable)] | None = None

    @property
    def max_body(self) -> int:
        """Largest request body in bytes."""
        return int(self.max_body_mb * (1 << 20))

    @property
    def min_rate(self) -> float:
        """Slowest body or answer in bytes a second."""
        return self.min_rate_kb * (1 << 10)

    @property
    def max_large_body(self) -> int:
        """Largest body of an image that is read in bands, in bytes."""
        return max(int(self.max_large_body_mb * (1 << 20)), self.max_body)

    @property
    def max_bodies(self) -> int:
        """Largest sum of the bodies under way in bytes; one body of the largest size always has room beside another."""
        return max(
            int(self.max_bodies_mb * (1 << 20)), 2 * self.max_body, self.max_body + int(self.many_mb * (1 << 20))
        )


def ignored(environment: Mapping[str, str] | None = None) -> list[str]:
    """MARGINALIA_* variables that are no settings but Kubernetes' links to services, sorted."""
    source = os.environ if environment is None else environment
    names = [(name, name.removeprefix(PREFIX)) for name in source if name.startswith(PREFIX)]
    return sorted(
        name
        for name, rest in names
        if _KUBERNETES.fullmatch(rest)
        or (_KUBERNETES_PORT.fullmatch(rest) and source[name].startswith(("tcp://", "udp://", "sctp://")))
    )


def from_environment(environment: Mapping[str, str] | None = None) -> Settings:
    """Settings from MARGINALIA_* variables, without the `ignored` ones.

    Raises:
        SettingsError: a variable is unknown (the nearest one is suggested) or its value is wrong (never repeated).
    """
    source = os.environ if environment is None else environment
    others = ignored(source)
    given = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in source.items()
        if name.startswith(PREFIX) and name not in others
    }
    for name in sorted(given.keys() - Settings.model_fields.keys()):
        near = difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=0.5)
        known = ", ".join(PREFIX + field.upper() for field in Settings.model_fields)
        hint = f"did you mean {PREFIX}{near[0].upper()}?" if near else f"known are {known}"
        raise SettingsError(f"{PREFIX}{name.upper()} is no setting; {hint}")
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise SettingsError(f"{PREFIX}{str(first['loc'][0]).upper()}: {first['msg']}; change or unset it") from error
