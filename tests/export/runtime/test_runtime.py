"""export.runtime.runtime against answers written in NumPy: golden, from threads, at every size."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from export.bundle import bundle
from export.runtime import cpu, runtime
from pipeline.imaging import resize
from tests.support import tiny_onnx

RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> runtime.Runtime:
    return runtime.Runtime(tiny_onnx.write(tmp_path_factory.mktemp("r") / "bundle"), provider="cpu", threads=1)


@pytest.mark.parametrize("shape", [(1, 16, 16, 3), (3, 48, 64, 3), (2, 160, 16, 3)])
def test_run_is_golden(opened: runtime.Runtime, shape: tuple[int, ...]) -> None:
    batch = RNG.integers(0, 256, shape, dtype=np.uint8)
    label, confidence = opened.run(batch)
    want_label, want_confidence = tiny_onnx.expected(batch)
    np.testing.assert_array_equal(label, want_label)
    np.testing.assert_array_equal(confidence, want_confidence)
    assert label.dtype == confidence.dtype == np.uint8


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (64, 64), (63, 50), (500, 333), (40, 1000)])
def test_segment_is_fit_then_model_then_restore(opened: runtime.Runtime, size: tuple[int, int]) -> None:
    image = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    plan = resize.plan(*size, long_side=64, stride=16)
    label, confidence = tiny_onnx.expected(resize.apply(image, plan)[None])
    found = opened.segment(image)
    np.testing.assert_array_equal(found.label_HW, resize.restore(label[0], plan))
    np.testing.assert_array_equal(found.confidence_HW, resize.restore(confidence[0], plan))
    np.testing.assert_array_equal(found.scaled_label_hw, label[0, : plan.scaled_height, : plan.scaled_width])
    np.testing.assert_array_equal(found.scaled_confidence_hw, confidence[0, : plan.scaled_height, : plan.scaled_width])
    assert found.label_HW.shape == size
    assert set(found.timings) == {"fit", "run", "restore"}
    assert min(found.timings.values()) >= 0


def test_threads_get_their_own_answers(opened: runtime.Runtime) -> None:
    pictures = [RNG.integers(0, 256, (40 + i, 30, 3), dtype=np.uint8) for i in range(32)]
    alone = [opened.segment(picture).label_HW for picture in pictures]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda picture: opened.segment(picture).label_HW, pictures))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        (np.zeros((1, 17, 16, 3), np.uint8), "multiples of 16"),
        (np.zeros((0, 16, 16, 3), np.uint8), "multiples of 16"),
        (np.zeros((16, 16, 3), np.uint8), "uint8 N x H x W x 3"),
        (np.zeros((1, 16, 16, 3), np.float32), "float32"),
        (np.zeros((1, 3, 16, 16), np.uint8), "uint8 N x H x W x 3"),
    ],
)
def test_wrong_batches_are_refused(opened: runtime.Runtime, batch: np.ndarray, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        opened.run(batch)


def test_a_graph_that_is_no_bundles_graph_is_refused(tmp_path: Path) -> None:
    wrong = tiny_onnx.write(tmp_path / "w", model_bytes=tiny_onnx.model(label_type=TensorProto.INT64))
    with pytest.raises(bundle.BundleError, match=r"model\.onnx: has .*int64"):
        runtime.Runtime(wrong, provider="cpu")
    empty = tiny_onnx.write(tmp_path / "e", model_bytes=b"\x08\x0a")  # a valid protobuf: IR version 10, nothing else
    with pytest.raises(bundle.BundleError, match=r"model\.onnx: cannot be loaded"):
        runtime.Runtime(empty, provider="cpu")


def test_warm_up_notices_ids_of_no_class(tmp_path: Path) -> None:
    runtime.Runtime(tiny_onnx.write(tmp_path / "good"), provider="cpu").warm_up()
    shifted = runtime.Runtime(tiny_onnx.write(tmp_path / "s", model_bytes=tiny_onnx.model(shift=9)), provider="cpu")
    with pytest.raises(bundle.BundleError, match=r"answers ids \[1\d\] that are no class"):
        shifted.warm_up()


def test_threads_default_to_cores_that_may_be_used(opened: runtime.Runtime) -> None:
    assert 1 <= cpu.cores() <= len(os.sched_getaffinity(0))
    assert opened.threads == 1
    one = sorted(os.sched_getaffinity(0))[:1]
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, one)
        assert cpu.cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_on_a_cpu_no_more_pixels_run_together_than_the_largest_image_has(tmp_path: Path) -> None:
    here = runtime.Runtime(tiny_onnx.write(tmp_path / "b", long_side=64), provider="cpu", threads=1)
    seen: list[tuple[int, ...]] = []
    real = here._session.run
    here._session.run = lambda images: (seen.append(images.shape), real(images))[1]  # type: ignore[method-assign]
    small, large = (RNG.integers(0, 256, (7, side, side, 3), dtype=np.uint8) for side in (32, 64))
    for batch in (small, large):
        label, _ = here.run(batch)
        np.testing.assert_array_equal(label, tiny_onnx.expected(batch)[0])
    assert [shape[0] for shape in seen] == [4, 2, 1] + [1] * 7


def test_a_candidate_is_warmed_for_the_sizes_that_came_lately(tmp_path: Path) -> None:
    old, new = (runtime.Runtime(tiny_onnx.write(tmp_path / n, long_side=64), provider="cpu", threads=1) for n in "ab")
    for side in (16, 32, 48, 32):
        old.run(np.zeros((1, side, 64, 3), np.uint8))
    assert list(old.recent) == [(16, 64), (32, 64), (48, 64)]
    for side in range(1, 40):
        old.run(np.zeros((1, 16, 16 * side, 3), np.uint8))
    assert len(old.recent) == runtime.RECENT
    seen: list[tuple[int, ...]] = []
    real = new._session.run
    new._session.run = lambda images: (seen.append(images.shape), real(images))[1]  # type: ignore[method-assign]
    new.warm_up([(16, 64), (32, 48), (40, 16), (128, 16)])  # no multiple of 16; larger than any that it will meet
    assert [shape[1:3] for shape in seen[-2:]] == [(16, 64), (32, 48)]
    assert len(seen) == 4
