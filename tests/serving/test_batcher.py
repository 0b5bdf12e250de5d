"""serving.batcher: what waits together runs together, and nobody gets somebody else's answer."""

from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export.runtime import BATCHES
from serving.batcher import Batcher, Ran
from tests import tiny_onnx
from tests.live_server import until
from tests.own_server import LONGEST, Held

RNG = np.random.default_rng(5)


def picture(height: int, width: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_own(ran: Ran, image_HWC: NDArray[np.uint8], threshold: float = 100.0) -> None:
    label_NHW, confidence_NHW = tiny_onnx.expected(image_HWC[None], threshold)
    np.testing.assert_array_equal(ran.label_HW, label_NHW[0])
    np.testing.assert_array_equal(ran.confidence_HW, confidence_NHW[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Held:
    return Held(tmp_path_factory.mktemp("batcher") / "bundle")


@pytest.fixture
def batcher(model: Held) -> Iterator[Batcher]:
    model.shapes.clear()
    made = Batcher(lambda runtime: 8, runners=1)
    yield made
    model.gate.set()
    made.close()


def busy(batcher: Batcher, model: Held) -> None:
    """The runner is held inside the model by an image of a size of its own."""
    model.gate.clear()
    batcher.submit(model, picture(16, 16))
    until(lambda: model.shapes == [(1, 16, 16)])


def test_mixed_sizes_from_many_threads_get_their_own_answers(model: Held) -> None:
    model.shapes.clear()
    batcher = Batcher(lambda runtime: 8)
    sizes = [(32, 48), (48, 32), (64, 64)]
    pictures = [picture(*sizes[i % 3]) for i in range(240)]
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda p: batcher.submit(model, p).result(LONGEST), pictures))
    for image_HWC, ran in zip(pictures, found, strict=True):
        assert_own(ran, image_HWC)
    assert {shape[0] for shape in model.shapes} <= set(BATCHES)
    assert sum(shape[0] for shape in model.shapes) == 240
    batcher.close()


def test_two_runners_run_two_batches_at_once(model: Held) -> None:
    batcher = Batcher(lambda runtime: 8)
    model.shapes.clear()
    model.gate.clear()
    futures = [batcher.submit(model, picture(*size)) for size in [(16, 16), (32, 32), (48, 48)]]
    until(lambda: len(model.shapes) == 2)
    model.gate.set()
    assert [future.result(LONGEST).batch for future in futures] == [1, 1, 1]
    batcher.close()


def test_what_waits_runs_in_the_largest_batch_of_one_size(model: Held, batcher: Batcher) -> None:
    busy(batcher, model)
    pictures = [picture(32, 48) if i % 2 else picture(48, 32) for i in range(22)]  # 11 of each, alternating
    futures = [batcher.submit(model, p) for p in pictures]
    model.gate.set()
    for image_HWC, future in zip(pictures, futures, strict=True):
        assert_own(future.result(LONGEST), image_HWC)
    assert model.shapes[1:] == [(8, 48, 32), (8, 32, 48), (2, 48, 32), (2, 32, 48), (1, 48, 32), (1, 32, 48)]
    assert futures[0].result().batch == 8
    assert futures[0].result().waited_s > 0


def test_the_oldest_goes_first_and_the_limit_holds(model: Held) -> None:
    told: list[int] = []
    model.shapes.clear()
    batcher = Batcher(lambda runtime: 3, told.append, runners=1)
    busy(batcher, model)
    futures = [batcher.submit(model, picture(*size)) for size in [(32, 32), (64, 64), (32, 32), (32, 32), (64, 64)]]
    model.gate.set()
    assert [future.result(LONGEST).batch for future in futures] == [2, 2, 2, 1, 2]
    assert model.shapes == [(1, 16, 16), (2, 32, 32), (2, 64, 64), (1, 32, 32)]
    batcher.close()
    assert told == [1, 2, 2, 1]


def test_alone_it_runs_at_once(model: Held, batcher: Batcher) -> None:
    for _ in range(3):
        ran = batcher.submit(model, picture(32, 32)).result(LONGEST)  # nobody else ever comes
        assert ran.batch == 1


def test_two_models_never_share_a_batch(model: Held, batcher: Batcher, tmp_path: Path) -> None:
    """As during a swap: each image is answered by the model that it was submitted with."""
    other = Held(tmp_path / "bundle", threshold=250.0)
    busy(batcher, model)
    pictures = [picture(32, 32) for _ in range(8)]
    futures = [batcher.submit((model, other)[i % 2], p) for i, p in enumerate(pictures)]
    model.gate.set()
    for i, (image_HWC, future) in enumerate(zip(pictures, futures, strict=True)):
        assert_own(future.result(LONGEST), image_HWC, (100.0, 250.0)[i % 2])
    assert model.shapes[1:] == [(4, 32, 32)]
    assert other.shapes == [(4, 32, 32)]


class Picky(Held):
    """Fails on every batch that holds an image whose first value is 13."""

    def run(self, images_NHWC: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        answer = super().run(images_NHWC)
        if (images_NHWC[:, 0, 0, 0] == 13).any():
            raise RuntimeError("no thirteens")
        return answer


def test_one_bad_image_does_not_take_the_others_down(tmp_path: Path) -> None:
    model = Picky(tmp_path / "bundle")
    batcher = Batcher(lambda runtime: 8, runners=1)
    busy(batcher, model)
    pictures = [picture(32, 32) for _ in range(8)]
    for i, image_HWC in enumerate(pictures):
        image_HWC[0, 0, 0] = 13 if i == 3 else 14
    futures = [batcher.submit(model, p) for p in pictures]
    model.gate.set()
    for i, future in enumerate(futures):
        if i == 3:
            with pytest.raises(RuntimeError, match="no thirteens"):
                future.result(LONGEST)
        else:
            assert_own(future.result(LONGEST), pictures[i])
    assert model.shapes == [(1, 16, 16), (8, 32, 32)] + [(1, 32, 32)] * 8
    batcher.close()


def test_dropped_images_never_reach_the_model(model: Held, batcher: Batcher) -> None:
    busy(batcher, model)
    futures = [batcher.submit(model, picture(32, 32)) for _ in range(4)]
    assert futures[0].cancel()
    assert futures[2].cancel()
    model.gate.set()
    assert [futures[i].result(LONGEST).batch for i in (1, 3)] == [2, 2]
    assert model.shapes == [(1, 16, 16), (2, 32, 32)]


def test_closing_drops_what_waits(model: Held) -> None:
    batcher = Batcher(lambda runtime: 8, runners=1)
    model.shapes.clear()
    busy(batcher, model)
    waiting = batcher.submit(model, picture(32, 32))
    with ThreadPoolExecutor(1) as pool:
        closed = pool.submit(batcher.close)
        with pytest.raises(CancelledError):
            waiting.result(LONGEST)
        model.gate.set()
        closed.result(LONGEST)
    assert model.shapes == [(1, 16, 16)]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(model, picture(32, 32))
