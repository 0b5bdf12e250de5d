"""serving.model.batcher: what waits together runs together, and nobody gets somebody else's answer."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export.runtime.batches import BATCH_SIZES
from serving.model.batcher import Batcher, Dropped, ImageJob, ModelRun
from tests.support import tiny_onnx
from tests.support.live_server import until
from tests.support.threaded_server import LONGEST, Held

RNG = np.random.default_rng(5)


def picture(height: int, width: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_own(ran: ModelRun, image_HWC: NDArray[np.uint8], threshold: float = 100.0) -> None:
    label_NHW, confidence_NHW = tiny_onnx.expected(image_HWC[None], threshold)
    np.testing.assert_array_equal(ran.label_HW, label_NHW[0])
    np.testing.assert_array_equal(ran.confidence_HW, confidence_NHW[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Held:
    return Held(tmp_path_factory.mktemp("batcher") / "bundle")


@pytest.fixture
def pool(model: Held) -> Iterator[ThreadPoolExecutor]:
    model.shapes.clear()
    with ThreadPoolExecutor(32) as made:
        yield made
        model.gate.set()


Submit = Callable[..., "Future[ModelRun]"]


def line(batcher: Batcher, pool: ThreadPoolExecutor, model: Held) -> Submit:
    """The model is held by an image of a size of its own; what is submitted from now on stands in line, in order."""
    model.gate.clear()
    pool.submit(batcher.run, model, picture(16, 16), ImageJob())
    until(lambda: model.shapes == [(1, 16, 16)])

    def submit(image_HWC: NDArray[np.uint8], other: Held = model, job: ImageJob | None = None) -> "Future[ModelRun]":
        before = batcher.waiting
        future = pool.submit(batcher.run, other, image_HWC, job or ImageJob())
        until(lambda: batcher.waiting == before + 1)
        return future

    return submit


def test_mixed_sizes_from_many_threads_get_their_own_answers(model: Held, pool: ThreadPoolExecutor) -> None:
    batcher = Batcher(lambda runtime: 8)
    sizes = [(32, 48), (48, 32), (64, 64)]
    pictures = [picture(*sizes[i % 3]) for i in range(240)]
    found = list(pool.map(lambda image_HWC: batcher.run(model, image_HWC, ImageJob()), pictures))
    for image_HWC, ran in zip(pictures, found, strict=True):
        assert_own(ran, image_HWC)
    assert {shape[0] for shape in model.shapes} <= set(BATCH_SIZES)
    assert sum(shape[0] for shape in model.shapes) == 240
    assert batcher.waiting == 0


def test_two_run_at_once_and_no_more(model: Held, pool: ThreadPoolExecutor) -> None:
    batcher = Batcher(lambda runtime: 8)
    model.gate.clear()
    futures = [pool.submit(batcher.run, model, picture(*size), ImageJob()) for size in [(16, 16), (32, 32), (48, 48)]]
    until(lambda: batcher.waiting == 1)
    assert len(model.shapes) == 2
    model.gate.set()
    assert [future.result(LONGEST).batch for future in futures] == [1, 1, 1]


def test_what_waits_runs_in_the_largest_batch_of_one_size(model: Held, pool: ThreadPoolExecutor) -> None:
    submit = line(Batcher(lambda runtime: 8, at_once=1), pool, model)
    pictures = [picture(32, 48) if i % 2 else picture(48, 32) for i in range(22)]  # 11 of each, alternating
    futures = [submit(image_HWC) for image_HWC in pictures]
    model.gate.set()
    for image_HWC, future in zip(pictures, futures, strict=True):
        assert_own(future.result(LONGEST), image_HWC)
    assert model.shapes[1:] == [(8, 48, 32), (8, 32, 48), (2, 48, 32), (2, 32, 48), (1, 48, 32), (1, 32, 48)]
    assert futures[0].result().batch == 8
    assert futures[0].result().waited_s > 0


def test_the_oldest_goes_first_and_the_limit_holds(model: Held, pool: ThreadPoolExecutor) -> None:
    told: list[int] = []
    submit = line(Batcher(lambda runtime: 3, told.append, at_once=1), pool, model)
    futures = [submit(picture(*size)) for size in [(32, 32), (64, 64), (32, 32), (32, 32), (64, 64)]]
    model.gate.set()
    assert [future.result(LONGEST).batch for future in futures] == [2, 2, 2, 1, 2]
    assert model.shapes == [(1, 16, 16), (2, 32, 32), (2, 64, 64), (1, 32, 32)]
    assert told == [1, 2, 2, 1]


def test_alone_it_runs_at_once_and_in_its_own_thread(model: Held, pool: ThreadPoolExecutor) -> None:
    threads: list[int] = []
    batcher = Batcher(lambda runtime: threads.append(threading.get_ident()) or 8)  # type: ignore[func-returns-value]
    assert batcher.run(model, picture(32, 32), ImageJob()).batch == 1  # nobody else ever comes
    assert threads == [threading.get_ident()]


def test_two_models_never_share_a_batch(model: Held, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    """As during a swap: each image is answered by the model that it was submitted with."""
    other = Held(tmp_path / "bundle", threshold=250.0)
    submit = line(Batcher(lambda runtime: 8, at_once=1), pool, model)
    pictures = [picture(32, 32) for _ in range(8)]
    futures = [submit(image_HWC, (model, other)[i % 2]) for i, image_HWC in enumerate(pictures)]
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


def test_one_bad_image_does_not_take_the_others_down(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    model = Picky(tmp_path / "bundle")
    submit = line(Batcher(lambda runtime: 8, at_once=1), pool, model)
    pictures = [picture(32, 32) for _ in range(8)]
    for i, image_HWC in enumerate(pictures):
        image_HWC[0, 0, 0] = 13 if i == 3 else 14
    futures = [submit(image_HWC) for image_HWC in pictures]
    model.gate.set()
    for i, future in enumerate(futures):
        if i == 3:
            with pytest.raises(RuntimeError, match="no thirteens"):
                future.result(LONGEST)
        else:
            assert_own(future.result(LONGEST), pictures[i])
    assert model.shapes == [(1, 16, 16), (8, 32, 32)] + [(1, 32, 32)] * 8


def test_dropped_images_never_reach_the_model(model: Held, pool: ThreadPoolExecutor) -> None:
    batcher = Batcher(lambda runtime: 8, at_once=1)
    submit, jobs = line(batcher, pool, model), [ImageJob() for _ in range(4)]
    futures = [submit(picture(32, 32), job=job) for job in jobs]
    for i in (0, 2):
        batcher.drop(jobs[i])
        with pytest.raises(Dropped):  # at once, with the model still held
            futures[i].result(LONGEST)
    model.gate.set()
    assert [futures[i].result(LONGEST).batch for i in (1, 3)] == [2, 2]
    assert model.shapes == [(1, 16, 16), (2, 32, 32)]


def test_a_batch_answered_short_is_everybodys_error(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """A model that answers fewer images than it was given must not leave anybody waiting."""

    class Short(Held):
        def run(self, images_NHWC: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
            label_NHW, confidence_NHW = super().run(images_NHWC)
            return label_NHW[1:], confidence_NHW[1:]

    batcher = Batcher(lambda runtime: 8)
    model = Short(tmp_path / "bundle")
    futures = [pool.submit(batcher.run, model, picture(32, 32), ImageJob()) for _ in range(6)]
    for future in futures:
        with pytest.raises(ValueError, match="zip"):
            future.result(LONGEST)
