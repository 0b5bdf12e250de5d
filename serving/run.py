"""Start the server: check what can be checked first, then hand over to BentoML's own command in this process."""

import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

from export.bundle import BundleError
from export.runtime import ProviderError
from serving import slots
from serving.pointer import PointerError
from serving.settings import PREFIX, Settings, SettingsError, from_environment


class StartError(RuntimeError):
    """The service cannot start; the message says what to do."""


def prepare(bundle: Path | None = None) -> Settings:
    """Settings with absolute paths, after the bundle was found, verified, loaded and warmed up once.

    Raises:
        StartError: a wrong setting, no or a bad bundle, or a provider that is not to be had.
    """
    try:
        settings = from_environment()
        update: dict[str, Path] = {"champions": settings.champions.absolute()}
        if bundle or settings.bundle:
            update["bundle"] = (bundle or settings.bundle or Path()).absolute()
        settings = settings.model_copy(update=update)
        slots.open_runtime(settings)
    except (SettingsError, PointerError, BundleError, ProviderError) as error:
        raise StartError(str(error)) from error
    return settings


def main(host: str = "127.0.0.1", port: int = 3000, bundle: Path | None = None) -> NoReturn:
    """Serve on `host`:`port` until SIGTERM or SIGINT. Does not return.

    Raises:
        StartError: as `prepare`.
    """
    settings = prepare(bundle)
    os.environ[PREFIX + "CHAMPIONS"] = str(settings.champions)
    if settings.bundle is not None:
        os.environ[PREFIX + "BUNDLE"] = str(settings.bundle)
    # glibc gives each thread a heap of its own and keeps what a model that was swapped out left there; the worker is a
    # process of its own and starts with this. Seen: 14 swaps grew 373 to 538 MB, of which trimming gave 172 back.
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    sys.argv = ["bentoml", "serve", "serving.service:Marginalia", "--host", host, "--port", str(port)]
    runpy.run_module("bentoml", run_name="__main__", alter_sys=True)
    sys.exit(0)
