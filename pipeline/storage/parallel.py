"""One piece of work over many items, on this machine's cores or a cluster's, by joblib; `scale` in params.yaml says which.

loky (processes) and threading are joblib's own. ray and dask are engines that may already run somewhere: the address is
taken from RAY_ADDRESS and DASK_SCHEDULER_ADDRESS, and without one a local engine is started. Workers on other machines
need this project's code and its folder under the same path.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any, TypeVar

from pipeline import config

AHEAD = 32  # items a worker may be ahead of the reader
T = TypeVar("T")
R = TypeVar("R")


class ScaleError(RuntimeError):
    """The backend cannot be used; the message says what to install or change."""


def ordered(
    work: Callable[[T], R], items: Iterable[T], scale: config.Scale, *, threads: bool = False
) -> Iterator[tuple[T, R]]:
    """(item, work(item)) in the items' order; at most `AHEAD` results for each worker are kept waiting.

    joblib's own generator takes from `items` as fast as the workers are done, whether or not anyone reads: the window
    is what bounds the memory.

    Args:
        work: importable by its name, for workers that are other processes.
        threads: stay in this process: for few items, where the start of others costs more than it brings.

    Raises:
        ScaleError: the backend's package is missing, or the engine cannot be reached.
        concurrent.futures.process.BrokenProcessPool: a worker process died (loky).
    """
    import joblib

    backend = "threading" if threads or scale.workers == 1 else scale.backend
    left = iter(items)
    with ExitStack() as stack:
        _start(backend, scale.workers, stack)
        stack.enter_context(joblib.parallel_config(backend=backend, n_jobs=scale.workers))
        gives = "list" if backend == "ray" else "generator"  # Ray's own backend knows no other
        parallel = stack.enter_context(joblib.Parallel(return_as=gives))
        while window := list(islice(left, AHEAD * scale.workers)):
            results = parallel(joblib.delayed(work)(item) for item in window)
            yield from zip(window, results, strict=True)


def _start(backend: str, workers: int, stack: ExitStack) -> None:
    """Have the engine ready, and end it with `stack` if it was started here."""
    try:
        if backend == "ray":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
            import ray
            from ray.util.joblib import register_ray

            register_ray()
            if not ray.is_initialized():
                ray.init(**({} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}))
                stack.callback(ray.shutdown)
        elif backend == "dask":
            from distributed import Client

            where: dict[str, Any] = {} if "DASK_SCHEDULER_ADDRESS" in os.environ else {
                "n_workers": workers, "threads_per_worker": 1, "dashboard_address": None,
            }  # fmt: skip
            stack.enter_context(Client(**where))
    except ImportError as error:
        raise ScaleError(
            f"scale.backend {backend}: {error.name} is not installed; `pip install 'marginalia-seg[scale]'`, or set "
            "scale.backend: loky"
        ) from error
    except (OSError, ConnectionError) as error:
        raise ScaleError(f"scale.backend {backend}: the engine cannot be reached ({error})") from error
