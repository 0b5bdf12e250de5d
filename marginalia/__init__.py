"""The command line: it wires the packages together, lazily, and holds no logic of its own."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("marginalia-seg")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"
