"""Marginalia in Python, and its command line.

    import marginalia
    model = marginalia.load("bundle")
    result = model.predict("image.jpg")

What stands in `__all__` is public and typed; all else, and the packages `pipeline`, `training`, `export` and `serving`, may
change with any version. Importing it is quick and changes nothing: what a name needs is imported when it is first used.
"""

import os
import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    # `python -m marginalia` has put the current folder first, where a `csv.py` or `numpy.py` that somebody sent would be
    # imported in place of the library's: from the next import on it is looked at last, and only where it is our own.
    _here = sys.path.pop(0)
    if os.path.realpath(_here) == os.path.dirname(os.path.dirname(os.path.realpath(__file__))):  # noqa: PTH120
        sys.path.append(_here)

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.bundle.bundle import BundleError as BundleError
    from export.runtime.runtime import ProviderError as ProviderError
    from marginalia.model import ImageError as ImageError
    from marginalia.model import Model as Model
    from marginalia.model import load as load
    from marginalia.result import ImageClass as ImageClass
    from marginalia.result import Result as Result
    from serving.client import AsyncClient as AsyncClient
    from serving.client import Client as Client


try:
    __version__ = version("marginalia-seg")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"

_HOMES = {
    "AsyncClient": "serving.client",
    "BundleError": "export.bundle.bundle",
    "Client": "serving.client",
    "ImageClass": "marginalia.result",
    "ImageError": "marginalia.model",
    "Model": "marginalia.model",
    "ProviderError": "export.runtime.runtime",
    "Result": "marginalia.result",
    "load": "marginalia.model",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """A public name, from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'marginalia' has no attribute {name!r}; public are {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
