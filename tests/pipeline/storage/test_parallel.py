"""The same work on every backend: results in order, memory bounded whoever is slow, a missing engine named."""

import importlib.util
import os
from collections.abc import Iterator

import pytest

from pipeline.storage import parallel
from tests.support import tiny_settings


def square(n: int) -> tuple[int, int]:
    return n * n, os.getpid()


@pytest.mark.parametrize("backend", ["threading", "loky", "dask", "ray"])
def test_every_backend_gives_the_same_in_order(backend: str) -> None:
    package = {"dask": "distributed"}.get(backend, backend)
    if backend in ("dask", "ray") and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra `scale`)")
    settings = tiny_settings.scale(backend=backend, workers=2)  # type: ignore[arg-type]
    found = list(parallel.ordered(square, range(150), settings))  # more than two windows
    assert [(item, result) for item, (result, _) in found] == [(n, n * n) for n in range(150)]
    elsewhere = {process for _, (_, process) in found} != {os.getpid()}
    assert elsewhere == (backend != "threading")


def test_few_items_stay_in_this_process() -> None:
    found = list(parallel.ordered(square, range(5), tiny_settings.scale(), threads=True))
    assert {process for _, (_, process) in found} == {os.getpid()}
    assert list(parallel.ordered(square, [], tiny_settings.scale())) == []


def test_a_slow_reader_holds_the_work_back() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for n in range(1000):
            taken += 1
            yield n

    settings = tiny_settings.scale(backend="threading", workers=2)
    most = 0
    for read, _ in enumerate(parallel.ordered(square, items(), settings)):
        most = max(most, taken - read)
    assert taken == 1000
    assert most <= parallel.AHEAD * 2


def fails(n: int) -> int:
    if n == 40:
        raise ValueError(f"item {n}")
    return n


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_an_error_of_the_work_is_the_readers(backend: str) -> None:
    with pytest.raises(ValueError, match="item 40"):
        list(parallel.ordered(fails, range(100), tiny_settings.scale(backend=backend)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("backend", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_missing_engine_is_named_with_its_extra(backend: str, package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed here")
    with pytest.raises(
        parallel.ScaleError, match=rf"scale\.backend {backend}: .*pip install 'marginalia-seg\[scale\]'"
    ):
        list(parallel.ordered(square, range(3), tiny_settings.scale(backend=backend)))  # type: ignore[arg-type]
