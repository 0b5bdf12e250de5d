"""What an operator can set: environment variables named MARGINALIA_*."""

import difflib
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, SecretStr, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from export.bundle.manifest import Precision, Provider
from export.runtime import container, cpu
from pipeline import paths

PREFIX = "MARGINALIA_"
# What Kubernetes puts into every pod for a service called marginalia or marginalia-<name>: MARGINALIA_SERVICE_HOST,
# MARGINALIA_SERVICE_PORT[_<name>], MARGINALIA_PORT=tcp://..., MARGINALIA_PORT_3000_TCP[_ADDR|_PORT|_PROTO].
_KUBERNETES = re.compile(r"(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_KUBERNETES_PORT = re.compile(r"(\w+_)?PORT")
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?")
_KIB = 1 << 10
_MIB = 1 << 20


class SettingsError(ValueError):
    """A MARGINALIA_* variable is unknown or wrong; the message names it and what to do."""


def token_lines(text: str) -> list[str]:
    """The tokens in a text: one a line, without the whitespace around it and without empty lines.

    Raises:
        ValueError: there is none, or one that does not pass through a header. The message repeats none of them.
    """
    lines = [line.strip() for line in text.split("\n")]
    plain = [line for line in lines if line]
    if not plain or not all(line.isascii() and line.isprintable() for line in plain):
        raise ValueError(
            "is empty or has other than printable ASCII characters; use such as `openssl rand -hex 32` prints"
        )
    return plain


def _sendable(tokens: SecretStr) -> SecretStr:
    try:
        return SecretStr("\n".join(token_lines(tokens.get_secret_value())))
    except ValueError as error:
        raise PydanticCustomError("token", str(error)) from error


def _origins(text: str) -> str:
    """Separated by spaces or commas, as browsers write them: a scheme, a host, and a port where it is not the scheme's."""
    origins = text.replace(",", " ").split()
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            advice = (
                "is no list of origins such as https://maps.example.org or http://localhost:8080, without a path; or *"
            )
            raise PydanticCustomError("origins", advice)
    return " ".join(origins)


def _address(text: str) -> str:
    host, _, port = text.strip().rpartition(":")
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]") if host.startswith("[") else host)
        good = (":" not in host or host.startswith("[")) and port.isascii() and 1 <= int(port) <= 65535
    except ValueError:
        good = False
    if not good:
        raise PydanticCustomError(
            "address", "is no address with a port, such as 127.0.0.1:3010, 0.0.0.0:3010 or [::]:3010"
        )
    return text.strip()


Tokens = Annotated[SecretStr, AfterValidator(_sendable)]
Origins = Annotated[str, AfterValidator(_origins)]
Address = Annotated[str, AfterValidator(_address)]


def _networks(text: str) -> str:
    """Each an address or a network."""
    for word in text.split():
        try:
            ipaddress.ip_network(word)
        except ValueError as error:
            raise PydanticCustomError(
                "network", "has a word that is no address and no network such as 10.0.0.0/8"
            ) from error
    return text


Networks = Annotated[str, AfterValidator(_networks)]


class Settings(BaseSettings):
    """Each field is the variable MARGINALIA_<FIELD>, and its docstring is its description. An argument goes before it."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", use_attribute_docstrings=True)

    # What is served, and with what

    bundle: Path | None = None
    """Folder of one bundle to serve; unset, the service follows `champions`."""

    champions: Path = paths.CHAMPION
    """The pointer file that the gate moves to each new champion."""

    poll_s: PositiveFloat = 2.0
    """Seconds between two looks at the pointer file."""

    provider: Provider = "auto"
    """Where the model runs: cpu, cuda, openvino or tensorrt; auto takes the fastest that parity admitted."""

    precision: Precision = "auto"
    """Its arithmetic: fp32, bf16, fp16 or int8; auto takes the fastest that parity admitted."""

    threads: PositiveInt | None = None
    """Threads of one run of the model; unset, the physical cores."""

    # How much is under way at once; what would be more gets 503

    concurrency: PositiveInt = Field(default_factory=lambda: cpu.cores() + 2)
    """Requests at work at once; unset, two more than the physical cores."""

    queue: NonNegativeInt = 32
    """Requests that may wait for a place among those at work."""

    max_batch: PositiveInt | None = None
    """Images of one size that run together if they wait together; unset, 8 on a GPU and 1 on the CPU."""

    long_at_once: PositiveInt = 2
    """Images at work at once that take long: native resolution, huge ones, and those whose decoder needs much memory."""

    long_queue: NonNegativeInt = 8
    """Such images that may wait for a place."""

    memory_mb: PositiveFloat | None = None
    """MiB for decoding and answering all images at work: half of it for long work, a quarter each for ordinary images and
    for those of calls of many. Unset, half of the container's limit, or a quarter of the machine's memory."""

    max_bodies_mb: PositiveFloat = 256.0
    """MiB of all request bodies under way."""

    # How much of it one client may have

    client_rate: PositiveFloat | None = None
    """Images a second of one client; what comes faster gets 429 with Retry-After. Unset, no limit."""

    client_burst: PositiveInt = 20
    """Images that one client may send at once before `client_rate` counts."""

    client_at_once: PositiveInt | None = None
    """Requests of one client under way at once. Unset, no limit."""

    client_by: Literal["address", "token"] = "address"
    """What tells clients apart. By token where each caller has one of its own; without tokens it is the address."""

    trusted_proxies: Networks = ""
    """Addresses and networks of the proxies before the service, separated by spaces, such as `10.0.0.0/8`. From these alone
    X-Forwarded-For is believed, whose last address that is none of them is the client's. Unset, a proxy's callers are all one
    client."""

    # Work that is fetched later (/v1/jobs)

    jobs: Path = Path(".marginalia/jobs")
    """Folder of the jobs that are kept; of this server alone."""

    jobs_at_once: PositiveInt = 1
    """Jobs at work at once."""

    jobs_kept: PositiveInt = 200
    """Jobs that are kept at once, waiting, running and ended."""

    jobs_mb: PositiveFloat = 4096.0
    """MiB of what was sent and answered for the jobs that are kept."""

    job_ttl_s: PositiveFloat = 24 * 3600.0
    """Seconds for which a job and its answer are kept after its end."""

    job_timeout_s: PositiveFloat = 3600.0
    """Seconds that one job may take, from when it is begun."""

    # One image

    max_body_mb: PositiveFloat = 32.0
    """MiB of the body of an ordinary image. More than 8 MiB lie in a temporary file."""

    max_pixels: PositiveInt = 250_000_000
    """Pixels of an image, and of an answer."""

    max_whole_pixels: PositiveInt = 50_000_000
    """Pixels of an image of a kind that must be decoded as a whole."""

    max_aspect: Annotated[float, Field(ge=1)] = 100.0
    """How many times as long as the shorter side the longer one may be."""

    large_pixels: PositiveInt = 16_000_000
    """Pixels from which an image is read, run and encoded in bands."""

    max_large_body_mb: PositiveFloat = 512.0
    """MiB of the body of an image that is read in bands."""

    # Many images in one call

    many_images: PositiveInt = 256
    """Images of one call."""

    many_mb: PositiveFloat = 64.0
    """MiB of the body of one call."""

    many_calls: PositiveInt = 2
    """Calls that are answered at a time."""

    many_timeout_s: PositiveFloat = 600.0
    """Seconds in which one call must be answered."""

    # How long requests and connections may take

    timeout_s: PositiveFloat = 15.0
    """Seconds of work after the body."""

    large_timeout_s: PositiveFloat = 300.0
    """Seconds of work on an image that is read in bands."""

    min_rate_kb: PositiveFloat = 16.0
    """KiB a second at which bodies must come and answers must be taken; how long that takes in all is not limited."""

    max_connections: PositiveInt = 512
    """Connections at once; the one that has been idle longest makes room for a new one, else the one whose body or answer
    moves slowest."""

    head_timeout_s: PositiveFloat = 10.0
    """Seconds in which the head of a request must arrive."""

    idle_timeout_s: PositiveFloat = 75.0
    """Seconds for which a connection may lie idle between two requests."""

    drain_s: PositiveFloat | None = None
    """Seconds for which requests under way may go on after SIGTERM; unset, as long as the slowest kind may take."""

    # Changing the model

    bundles: Path | None = None
    """Folder below which a request may name bundles; unset, the one that holds `champions/`."""

    load_timeout_s: PositiveFloat = 20.0
    """Seconds in which a bundle named in a request must be loaded and checked."""

    allow_class_change: bool = False
    """Whether a candidate may have other classes than the model that it replaces."""

    max_slowdown: Annotated[float, Field(ge=1)] = 3.0
    """How many times as slow as the model that it replaces a candidate may be."""

    shadow: str | None = None
    """A bundle below `bundles` to compare with the champion from the start; it answers nobody."""

    shadow_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the images, 0 to 1, that the shadow sees."""

    admin_address: Address | None = None
    """Address and port of a second listener, with connections of its own, for probes, metrics, statistics and changes of the
    model; all but the probes are there alone then. Plain HTTP, so of a machine or a network of one's own. Unset, everything
    answers at the one port."""

    # What is written down, and who may ask

    statistics: Path | None = None
    """Folder for files of prediction statistics; unset, none are written."""

    statistics_every_s: PositiveFloat = 60.0
    """Seconds between two writes of the statistics."""

    token: Tokens | None = None
    """Bearer token of every request for an answer or about models; several, one a line, while they are being replaced.
    Unset, everybody is answered."""

    change_token: Tokens | None = None
    """Bearer token, or several, of those who may change the model, and ask for all else. Unset, `token` may; where that is
    unset too, nobody."""

    token_file: Path | None = None
    """File with more of the tokens of `token`, one a line; read again when it changes, so that tokens are replaced without a
    restart."""

    change_token_file: Path | None = None
    """File with more of the tokens of `change_token`; as `token_file`."""

    cors_origins: Origins = ""
    """Origins of web pages that may ask from a browser, separated by spaces or commas; * is every one."""

    @property
    def asks_need_token(self) -> bool:
        """Whether every request for an answer needs a token."""
        return self.token is not None or self.token_file is not None

    @property
    def changes_need_token(self) -> bool:
        """Whether somebody may change the models, with a token; else nobody may."""
        return self.asks_need_token or self.change_token is not None or self.change_token_file is not None

    @property
    def origins(self) -> list[str]:
        """Origins of web pages that may ask; empty where only the service's own page may."""
        return self.cors_origins.split()

    @property
    def admin(self) -> tuple[str, int] | None:
        """The IP address and port of the second listener."""
        if self.admin_address is None:
            return None
        host, _, port = self.admin_address.rpartition(":")
        return host.removeprefix("[").removesuffix("]"), int(port)

    @property
    def drain_limit_s(self) -> float:
        """Seconds between SIGTERM and the end of the last request; whoever starts the service has to wait a little longer."""
        return self.drain_s or max(self.timeout_s, self.large_timeout_s, self.many_timeout_s)

    @property
    def proxies(self) -> list[str]:
        """The addresses and networks of `trusted_proxies`."""
        return self.trusted_proxies.split()

    @property
    def memory(self) -> int:
        """Bytes that the images at work may take together."""
        if self.memory_mb is not None:
            return int(self.memory_mb * _MIB)
        limit = container.memory_limit()
        machine = container.machine_memory()
        return limit // 2 if limit is not None and limit < machine else machine // 4

    @property
    def max_body(self) -> int:
        """Largest request body in bytes."""
        return int(self.max_body_mb * _MIB)

    @property
    def min_rate(self) -> float:
        """Slowest body or answer in bytes a second."""
        return self.min_rate_kb * _KIB

    @property
    def max_large_body(self) -> int:
        """Largest body of an image that is read in bands, in bytes."""
        return max(int(self.max_large_body_mb * _MIB), self.max_body)

    @property
    def max_bodies(self) -> int:
        """Largest sum of the bodies under way in bytes; half of it, which large ones may fill, has room for the largest."""
        largest_call = int(self.many_mb * _MIB)
        return max(int(self.max_bodies_mb * _MIB), 2 * max(self.max_body, largest_call))


def _variables() -> list[str]:
    """The names of all MARGINALIA_* variables, sorted."""
    return sorted(name for name in os.environ if name.startswith(PREFIX))


def ignored() -> list[str]:
    """MARGINALIA_* variables that are no settings but Kubernetes' links to services, sorted."""
    return [name for name in _variables() if _is_service_link(name)]


def _is_service_link(variable: str) -> bool:
    rest = variable.removeprefix(PREFIX)
    if _KUBERNETES.fullmatch(rest):
        return True
    is_url = os.environ[variable].startswith(("tcp://", "udp://", "sctp://"))
    return is_url and _KUBERNETES_PORT.fullmatch(rest) is not None


def from_environment() -> Settings:
    """Settings from MARGINALIA_* variables, without the `ignored` ones.

    Raises:
        SettingsError: a variable is unknown (the nearest one is suggested) or its value is wrong (never repeated).
    """
    links = ignored()
    for variable in _variables():
        if variable not in links:
            _check_known(variable)

    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise SettingsError(f"{PREFIX}{str(first['loc'][0]).upper()}: {first['msg']}; change or unset it") from error


def _check_known(variable: str) -> None:
    """Raises SettingsError where no setting has that name."""
    fields = Settings.model_fields
    name = variable.removeprefix(PREFIX).lower()
    if name in fields:
        return
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    known = ", ".join(PREFIX + field.upper() for field in fields)
    hint = f"did you mean {PREFIX}{near[0].upper()}?" if near else f"known are {known}"
    raise SettingsError(f"{PREFIX}{name.upper()} is no setting; {hint}")
