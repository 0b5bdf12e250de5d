"""One bundle, and the code that answers with it, as a bento in BentoML's store (BENTOML_HOME).

`bentoml serve marginalia:latest` then needs neither this folder nor a champion. The Dockerfile that BentoML puts into
every bento is not ours and not used: deploy/Dockerfile is.
"""

import importlib.util
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from export.bundle.bundle import open_bundle
from serving.bento import usage

ROOT = Path(__file__).absolute().parents[2]
PACKAGES = ("serving", "export", "pipeline")
SERVICE = "serving.bento.packed:Marginalia"
DISTRIBUTION = "marginalia-seg"
_EXTRAS = ("", "serve", "cpu", "gpu", "openvino", "geo")  # base, service, what brings a runtime, valid polygons


class BentoError(RuntimeError):
    """A bento cannot be built; the message says what to do."""


def requirements() -> list[str]:
    """What the bento's Python needs, as `name[extras]==version`: base, service and installed runtimes.

    Raises:
        BentoError: run from a folder without being installed, so that no metadata lists what is needed.
    """
    try:
        stated = [Requirement(line) for line in requires(DISTRIBUTION) or []]
    except PackageNotFoundError as error:
        raise BentoError(f"{DISTRIBUTION} is not installed here; run pip install '.[cpu]' in its folder") from error
    pinned = []
    for item in stated:
        if item.marker is not None and not any(item.marker.evaluate({"extra": extra}) for extra in _EXTRAS):
            continue
        if item.name == DISTRIBUTION:  # an extra that brings another
            continue

        extras = f"[{','.join(sorted(item.extras))}]" if item.extras else ""
        try:
            pinned.append(f"{item.name}{extras}=={version(item.name)}")
        except PackageNotFoundError:  # a runtime that this machine does without
            continue
    return sorted(set(pinned))


def stage(bundle: Path, folder: Path) -> str:
    """Lay code and bundle out in `folder` as a bento's root; returns the bundle's id.

    Raises:
        BundleError: the bundle, or its copy, does not verify.
    """
    open_bundle(bundle)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    if (ROOT / "LICENSE").is_file():  # absent where the package is installed and not a checkout
        shutil.copy(ROOT / "LICENSE", folder)
    shutil.copytree(bundle, folder / "bundle")
    return open_bundle(folder / "bundle").manifest.id


def build(bundle: Path) -> tuple[str, Path]:
    """Build the bento of a bundle; returns its tag and folder. For a process of its own: it imports the service.

    Raises:
        BundleError: the bundle does not verify.
        BentoError: BentoML refuses, or would have to install something first.
    """
    usage.turn_off_tracking()
    if shutil.which("uv") is None and importlib.util.find_spec("uv") is None:  # BentoML would fetch it unasked
        raise BentoError("BentoML builds with uv, which is not installed here; run pip install uv")
    import bentoml

    with tempfile.TemporaryDirectory(prefix="marginalia-bento-") as temporary:
        held = stage(Path(bundle), Path(temporary))
        try:
            made = bentoml.bentos.build(
                SERVICE,
                name="marginalia",
                labels={"bundle": held},
                description=f"Marginalia with bundle {held}: POST an image to /v1/segment.",
                include=["*"],
                python={"packages": requirements(), "lock_packages": False},
                build_ctx=temporary,
            )
        except bentoml.exceptions.BentoMLException as error:
            raise BentoError(f"BentoML could not build the bento: {error}") from error
    return str(made.tag), Path(made.path)
