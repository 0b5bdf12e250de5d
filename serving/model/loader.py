"""A candidate on its way: opened, warmed up and checked beside the model that is served."""

from pathlib import Path

from export.bundle.bundle import BundleError, open_bundle
from export.runtime.runtime import ProviderError, Runtime
from serving.model import checks
from serving.model.champion import PointerError, bundle_folder
from serving.model.idle_priority import run_at_idle_priority
from serving.settings import Settings


def open_runtime(
    settings: Settings, folder: Path | None = None, threads: int | None = None, like: Runtime | None = None
) -> Runtime:
    """Find (the champion, unless `folder` is given), verify, load and warm up, also for the sizes that `like` met lately.

    Raises PointerError, BundleError or ProviderError.
    """
    runtime = Runtime(
        open_bundle(folder or bundle_folder(settings)),
        provider=settings.provider,
        precision=settings.precision,
        threads=threads or settings.threads,
    )
    runtime.warm_up(list(like.recent) if like else ())
    return runtime


def open_candidate(settings: Settings, folder: Path, current: Runtime | None, *, allow_class_change: bool) -> Runtime:
    """The bundle in `folder`, checked for what it answers, or merely opened where `current` serves it already.

    While a model is served this runs on cores that no request wants.

    Raises:
        CandidateRefused, BundleError, ProviderError, or what else its runtime fails with.
    """

    def open_and_check() -> Runtime:
        candidate = open_runtime(settings, folder, like=current)
        if not is_same(candidate, current):
            checks.check_answers(candidate, current, allow_class_change)
        return candidate

    return open_and_check() if current is None else run_at_idle_priority(open_and_check)


def is_same(candidate: Runtime, current: Runtime | None) -> bool:
    """Whether the bundle is served already."""
    return current is not None and candidate.bundle.manifest == current.bundle.manifest


def refusal_cause(error: Exception) -> str:
    """Why a candidate was refused, one of `metrics.CAUSES`."""
    if isinstance(error, checks.CandidateRefused):
        return error.cause
    causes = {PointerError: "pointer", BundleError: "bundle", ProviderError: "provider"}
    return next((cause for kind, cause in causes.items() if isinstance(error, kind)), "failed")
