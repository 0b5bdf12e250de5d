"""The command line: it wires the packages together, lazily, and holds no logic of its own."""

import os
import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    # `python -m marginalia` has put the current folder first, where a `csv.py` or `numpy.py` that somebody sent would be
    # imported in place of the library's: from the next import on it is looked at last, and only where it is our own.
    _here = sys.path.pop(0)
    if os.path.realpath(_here) == os.path.dirname(os.path.dirname(os.path.realpath(__file__))):  # noqa: PTH120
        sys.path.append(_here)

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("marginalia-seg")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"
