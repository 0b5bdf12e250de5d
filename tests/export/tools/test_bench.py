"""export.tools.bench: what it computes from raw seconds, and a small real run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from export.bundle import bundle
from export.tools import bench, bench_process, bench_rows, bench_worker
from export.tools.bench_protocol import BundleTask, Facts, Failed, Ready
from export.tools.bench_rows import Case, Measured
from export.tools.sizes import Size, SizeError
from pipeline import console
from pipeline.imaging import decode
from tests.export.tools.test_predict import run
from tests.support import tiny_onnx, tiny_settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx.write(tmp_path_factory.mktemp("b") / "bundle").folder


FACTS = Facts(provider="cpu", precision="fp32", threads=1, tensor=(1, 32, 64, 3))
READY = Ready(facts=FACTS, once=0.1, peak_bytes=3 << 20)


def raw(run: list[list[float]], stream: list[list[float]] = (), batch: int = 1, **case: Any) -> Measured:
    facts = {"runtime": "onnxruntime", "device": "cpu", "precision": "fp32"} | case
    task = BundleTask(
        size=(64, 32), batch=batch, threads=1, bundle="bundle", provider="cpu", precision="fp32", images=10
    )
    made = Case(**facts, module="export.tools.bench_worker", task=task)
    return Measured(made, READY, [tuple(one) for one in run], [tuple(one) for one in stream])


def test_a_row_from_seconds() -> None:
    base = raw([[0.2, 0.2, 0.8], [0.4]])  # medians 0.2, 0.4
    mine = raw([[0.1, 0.1, 0.3], [0.1]], [[2.0], [1.0]])  # medians 0.1, 0.1; 0.2 and 0.1 s an image from JPEG to PNG
    row = bench_rows.row(mine, base)
    assert row.p50_ms == pytest.approx(100)
    assert row.p99_ms == pytest.approx(1e3 * np.percentile([0.1, 0.1, 0.1, 0.3], 99))
    assert row.calls == 4
    assert row.images_per_s == pytest.approx(10)
    assert row.stream_images_per_s == pytest.approx(1 / 0.15)
    assert row.r2 == pytest.approx((0.5 + 1.0) / 2)
    assert row.speedup == pytest.approx((0.2 / 0.1 + 0.4 / 0.1) / 2)
    assert row.peak_mb == 3
    assert bench_rows.row(base, base).speedup == 1


def test_a_row_of_a_batch_has_images_a_second_and_no_r2() -> None:
    row = bench_rows.row(raw([[0.5], [0.5]], batch=4), None)
    assert row.images_per_s == pytest.approx(8)
    assert (row.r2, row.speedup) == (None, None)


def test_a_failed_configuration_is_a_row_that_says_why() -> None:
    failed = replace(raw([[1.0]]), hello=Failed(failed="no card"))  # after a round
    assert bench_rows.row(failed, None).failed == "no card"
    assert bench_rows.row(raw([[1.0], [1.0]]), failed).speedup is None


def test_the_baseline_is_ort_fp32_on_the_same_device() -> None:
    cpu, cuda = raw([[1.0]]), raw([[1.0]], device="cuda")
    int8, vino = raw([[1.0]], precision="int8"), raw([[1.0]], runtime="openvino")
    fast = raw([[1.0]], runtime="tensorrt", device="cuda", precision="fp16")
    group = [vino, int8, cuda, cpu, fast]
    assert all(bench_rows.baseline(group, one) is cpu for one in (vino, int8, cpu))
    assert bench_rows.baseline(group, fast) is cuda
    assert bench_rows.baseline([cpu, fast], fast) is cpu
    assert bench_rows.baseline([vino], vino) is None


def test_sizes_and_batches_are_checked(folder: Path) -> None:
    for sizes, batches, named in (
        (["640"], ["1"], "--sizes: '640'"),
        (["0x5"], ["1"], "--sizes"),
        ([], ["x"], "--batches"),
    ):
        with pytest.raises(SizeError, match=named):
            bench.bench(folder, bench.BenchOptions(sizes, batches))
    for no_file in (folder / "none", folder):
        with pytest.raises(bench.BenchError, match="--student"):
            bench.bench(folder, bench.BenchOptions(student=no_file))


@pytest.mark.slow
def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = ("--sizes", "100x60", "--sizes", "32x32", "--batches", "1,3", "--rounds", "2", "--threads", "1")
    done = run("bench", folder, *arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    said = json.loads(out.read_text())
    rows = [row for row in said["rows"] if row["runtime"] == "onnxruntime"]
    assert [(row["size"], row["batch"]) for row in rows] == [
        ([100, 60], 1), ([100, 60], 3), ([32, 32], 1), ([32, 32], 3),
    ]  # fmt: skip
    assert rows[1]["tensor"] == [3, 48, 64, 3]  # 100x60, scaled to the long side of 64, padded to 16
    for row in rows:
        assert row["speedup"] == 1
        assert row["threads"] == 1
        assert 10 < row["peak_mb"] < 4000
        assert row["p99_ms"] >= row["p50_ms"] > 0
        assert len(row["rounds_s"]) == 2
        assert (row["r2"] is not None) == (row["batch"] == 1)
    assert said["bundle"] == bundle.open_bundle(folder).manifest.id
    assert said["machine"]["versions"].keys() >= {"python", "numpy", "pillow"}
    assert said["machine"]["cores"] >= 1
    assert "onnxruntime cpu fp32" in done.stdout


def test_children_that_fail_or_die_do_not_stop_the_others(folder: Path) -> None:
    opened = bundle.open_bundle(folder)
    good = next(c for c in bench.cases(opened, Size(32, 32), 1, 1) if c.runtime == "onnxruntime")
    refused = Case("x", "cpu", "int8", good.module, good.task.model_copy(update={"precision": "int8"}))
    dead = Case("y", "cpu", "fp32", "export.no_such_module", good.task)
    with console.bar("bench", 3, Console(quiet=True)) as bar:
        found = bench_process.measure([refused, dead, good], 1, bar)
    assert "int8" in found[0].hello.failed
    assert "no_such_module" in found[1].hello.failed
    assert len(found[2].run) == len(found[2].stream) == 1


@pytest.mark.slow
def test_torch_gives_rows_of_its_own(folder: Path, tmp_path: Path) -> None:
    from training.models import segmenter

    student = tmp_path / "student.safetensors"
    model = tiny_settings.model(encoder="mobilenetv3_small_050", weights=None, architecture="FPN")
    meta = {"params": {"model": model.model_dump(mode="json")}, "classes": ["a", "b"]}
    segmenter.save(student, segmenter.build(model, 2).state_dict(), meta)
    group = [c for c in bench.cases(bundle.open_bundle(folder), Size(64, 64), 2, 1, student) if "torch" in c.runtime]
    assert [c.runtime for c in group] == ["torch eager", "torch channels_last", "torch compile"]
    with console.bar("bench", 1, Console(quiet=True)) as bar:
        row = bench_rows.row(
            bench_process.measure(group[1:2], 1, bar)[0], None
        )  # one stands for all: torch takes long to start
    assert isinstance(row, bench_rows.Row)
    assert row.tensor == (2, 64, 64, 3)
    assert row.device in ("cpu", "cuda")


def test_the_picture_is_the_same_every_time_and_packs_like_a_photograph() -> None:
    image_HWC = bench_worker.picture(320, 240)
    assert image_HWC.shape == (240, 320, 3)
    np.testing.assert_array_equal(image_HWC, bench_worker.picture(320, 240))
    data = bench_worker.jpeg(image_HWC)
    assert 0.05 < len(data) / (320 * 240) < 0.6
    assert decode.decode(data, max_pixels=1 << 20).shape == image_HWC.shape


def test_the_peak_is_the_childs_own() -> None:
    before = bench_worker.peak_bytes()
    held = np.ones(64 << 20, np.uint8)
    assert bench_worker.peak_bytes() >= before
    assert bench_worker.peak_bytes() >= held.nbytes
