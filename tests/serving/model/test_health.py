"""model.health: a failed run tests the model once at a time; only one that fails the test is lost."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from export.bundle.bundle import BundleError
from serving.model.health import ModelHealth
from tests.support.threaded_server import Held, manager_of


class Failing(Held):
    """Fails the test while `broken`, and counts the tests."""

    broken = False
    tests = 0

    def warm_up(self, sizes: object = ()) -> None:
        self.tests += 1
        assert self.gate.wait(60)
        if self.broken:
            raise BundleError("device lost")


def test_only_a_model_that_fails_the_test_is_lost(tmp_path: Path) -> None:
    model = Failing(tmp_path / "bundle")
    manager, lost = manager_of(model), []
    for broken in (False, True):
        model.broken = broken
        with ThreadPoolExecutor(1) as workers:
            health = ModelHealth(manager, workers)
            health.on_lost = lambda: lost.append(1)
            health.doubt(model)
        assert health.is_good is not broken
        assert len(lost) == int(broken)
    manager.current = Held(tmp_path / "next")
    assert health.is_good  # another model in its place is another matter


def test_one_test_at_a_time_and_none_while_the_pool_closes(tmp_path: Path) -> None:
    model = Failing(tmp_path / "bundle")
    model.gate.clear()
    with ThreadPoolExecutor(2) as workers:
        health = ModelHealth(manager_of(model), workers)
        for _ in range(3):
            health.doubt(model)
        model.gate.set()
    assert model.tests == 1
    health.doubt(model)  # the pool is closed
    assert model.tests == 1
