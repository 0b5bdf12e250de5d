"""What happens to the models: a record for each kind of event, and the log that keeps the newest."""

import time
from collections import deque
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from export.runtime.runtime import Runtime
from serving.model.champion import shown
from serving.model.loader import refusal_cause
from serving.settings import Settings
from serving.telemetry import metrics

NEWEST = 20
Source = Literal["pointer", "load", "shadow"]


def _now() -> float:
    return round(time.time(), 3)


class Candidate(BaseModel):
    """What is being loaded and checked: who asked (pointer, load, shadow), where it lies, since when (unix seconds)."""

    model_config = ConfigDict(frozen=True)

    source: Source
    path: str
    since: float = Field(default_factory=_now)


class BaseEvent(BaseModel):
    """Something that happened to the models at `time` (unix seconds)."""

    model_config = ConfigDict(frozen=True)

    time: float = Field(default_factory=_now)
    event: str


class BundleLoaded(BaseEvent):
    """A bundle was put in the place of the one `before` it. `passed_over` has the reasons why faster options do not run."""

    event: Literal["bundle-loaded"] = "bundle-loaded"
    bundle: str
    before: str | None
    source: Source
    provider: str
    precision: str
    passed_over: dict[str, str] | None
    threads: int


class BundleSame(BaseEvent):
    """A bundle is served already."""

    event: Literal["bundle-same"] = "bundle-same"
    bundle: str
    source: Source


class BundleRefused(BaseEvent):
    """A candidate was not put in place; `cause` is one of `metrics.CAUSES`."""

    event: Literal["bundle-refused"] = "bundle-refused"
    error: str
    source: Source
    path: str
    cause: str
    still_serving: str | None

    @classmethod
    def of(cls, candidate: Candidate, error: Exception, current: Runtime | None, **more: Any) -> Self:
        """The event of a candidate that failed with `error` while `current` is served; `more` are a subclass's fields."""
        return cls(
            error=str(error),
            source=candidate.source,
            path=candidate.path,
            cause=refusal_cause(error),
            still_serving=current.bundle.manifest.id if current else None,
            **more,
        )


class ChampionRefused(BundleRefused):
    """As that, of the champion; tried again after `retry_s`, or never before the pointer changes (null)."""

    retry_s: float | None


class RolledBack(BaseEvent):
    """The previous bundle is served again, in the place of the one `before`."""

    event: Literal["rolled-back"] = "rolled-back"
    bundle: str
    before: str


class ShadowStarted(BaseEvent):
    """A bundle is compared with the one that is served."""

    event: Literal["shadow-started"] = "shadow-started"
    bundle: str


class ShadowEnded(BaseEvent):
    """A bundle is no longer compared."""

    event: Literal["shadow-ended"] = "shadow-ended"
    bundle: str


class ShadowRefused(BaseEvent):
    """MARGINALIA_SHADOW names no bundle."""

    event: Literal["shadow-refused"] = "shadow-refused"
    error: str


ModelEvent = (
    BundleLoaded
    | BundleSame
    | ChampionRefused
    | BundleRefused
    | RolledBack
    | ShadowStarted
    | ShadowEnded
    | ShadowRefused
)


class EventLog:
    """Writes each event to the log, and keeps the newest as callers may see them: without where the folders lie."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._events: deque[ModelEvent] = deque(maxlen=NEWEST)

    def newest(self) -> list[ModelEvent]:
        """The last `NEWEST` events, the newest last."""
        return list(self._events)

    def add(self, event: ModelEvent) -> None:
        """Log and keep one event."""
        metrics.event(event.event, **event.model_dump(exclude={"time", "event"}))
        self._keep(event)

    def add_refusal(self, event: BundleRefused, error: Exception) -> None:
        """Count, log and keep a candidate's failure; an unexpected one with its traceback in the log."""
        metrics.swapped("refused", event.cause)
        if event.cause != "failed":
            self.add(event)
            return
        metrics.failure(event.event, error, **event.model_dump(exclude={"time", "event", "error"}))
        self._keep(event.model_copy(update={"error": repr(error)}))

    def _keep(self, event: ModelEvent) -> None:
        texts = {name: shown(self._settings, value) for name, value in event if isinstance(value, str)}
        self._events.append(event.model_copy(update=texts))
