"""Start the server: check what can be checked first, then hand over to BentoML's own command in this process."""

import gc
import os
import runpy
import sys
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from serving.bento import address, usage, working_folder

if TYPE_CHECKING:
    from serving.settings import Settings


class StartError(RuntimeError):
    """The service cannot start; the message says what to do."""


def prepare(bundle: Path | None = None) -> "Settings":
    """Settings with absolute paths, after the bundle was found, verified, loaded and warmed up once.

    Raises:
        StartError: a wrong setting or file of tokens, no or a bad bundle, or a provider that is not to be had.
    """
    from export.bundle.bundle import BundleError
    from export.runtime.runtime import ProviderError
    from serving.access.tokens import Roles
    from serving.model import loader
    from serving.model.champion import PointerError
    from serving.settings import SettingsError, from_environment

    try:
        settings = from_environment()
        Roles(settings)
        update: dict[str, Path] = {"champions": settings.champions.absolute()}
        if bundle or settings.bundle:
            update["bundle"] = (bundle or settings.bundle or Path()).absolute()
        settings = settings.model_copy(update=update)
        loader.open_runtime(settings)
    except (SettingsError, PointerError, BundleError, ProviderError) as error:
        raise StartError(str(error)) from error
    return settings


def _check(sender: Connection, bundle: Path | None) -> None:
    try:
        sender.send(prepare(bundle))
    except Exception as error:
        sender.send(
            error if isinstance(error, StartError) else StartError(f"the bundle cannot be tried out: {error!r}")
        )


def prepared(bundle: Path | None = None) -> "Settings":
    """`prepare` in a process of its own while this one imports BentoML's command: each takes more than a second, and what
    the check needed does not stay in the memory of the process that only watches the workers.

    Raises:
        StartError: as `prepare`, or the check ended without an answer.
    """
    receiver, sender = Pipe(duplex=False)
    check = Process(target=_check, args=(sender, bundle), daemon=True)
    check.start()
    sender.close()  # the check's end alone is open, so that its death ends the wait
    gc.disable()  # what is imported stays: looking for garbage among it takes 0.1 s
    try:
        import bentoml_cli.cli  # noqa: F401
    finally:
        gc.enable()
    try:
        outcome: Settings | StartError = receiver.recv()
    except EOFError as error:
        raise StartError("the bundle's check ended without an answer: is there memory for the model?") from error
    check.join()
    if isinstance(outcome, StartError):
        raise outcome
    return outcome


def _check_admin(admin: tuple[str, int], public: tuple[str, int]) -> None:
    hint = "set MARGINALIA_ADMIN_ADDRESS to another one"
    if admin[1] == public[1]:
        raise StartError(f"port {admin[1]} is the one for callers; {hint}")
    try:
        address.check_free(*admin, hint)
    except address.AddressError as error:
        raise StartError(str(error)) from error


def main(host: str | None = None, port: int | None = None, bundle: Path | None = None) -> NoReturn:
    """Serve on `host`:`port` until SIGTERM or SIGINT. Does not return. Without them as HOST and PORT say.

    Raises:
        StartError: as `prepare`, or it cannot listen there.
    """
    usage.turn_off_tracking()
    try:
        listen_host = address.chosen_host(host)
        listen_port = address.chosen_port(port)
        address.check_free(listen_host, listen_port, "choose another with --host and --port, or HOST and PORT")
    except address.AddressError as error:
        raise StartError(str(error)) from error
    settings = prepared(bundle)
    if settings.admin is not None:
        _check_admin(settings.admin, (listen_host, listen_port))
    from serving.settings import PREFIX

    os.environ[PREFIX + "CHAMPIONS"] = str(settings.champions)
    if settings.bundle is not None:
        os.environ[PREFIX + "BUNDLE"] = str(settings.bundle)
    # glibc gives each thread a heap of its own and keeps what a model that was swapped out left there; the worker is a
    # process of its own and starts with this. Observed: 14 swaps grew 373 to 538 MB, of which trimming gave 172 back.
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    options = ["--host", listen_host, "--port", str(listen_port), *working_folder.options()]
    sys.argv = ["bentoml", "serve", "serving.bento.service:Marginalia", *options]
    runpy.run_module("bentoml", run_name="__main__", alter_sys=True)
    sys.exit(0)
