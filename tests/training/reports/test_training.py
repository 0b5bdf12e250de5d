"""The stage that draws a training: from its files alone it makes the pictures that the training could have made itself."""

import math
from collections.abc import Sequence

import pytest

from pipeline import paths
from pipeline.storage import atomic, manifest
from tests.support import tiny_project
from tests.support.command_line import marginalia
from training import train
from training.models import segmenter
from training.reports import curves
from training.split_data import SplitData

STEPS = {"steps": 12, "batch_labelled": 2, "batch_unlabelled": 2, "crop": (64, 64), "warmup_steps": 2, "val_every": 10}


@pytest.mark.parametrize(
    "settings", [{"method": "s4mc", "s4mc": {"preset": "ref_a"}}, {"method": "supervised"}], ids=str
)
def test_pictures_need_no_more_than_the_files_of_the_training(tmp_path, monkeypatch, settings):
    written = train.history_lines
    measured: list[dict[str, float]] = []

    def history_lines(history: Sequence[dict[str, float]]) -> str:
        measured.extend(history)
        return written(history)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "history_lines", history_lines)
    tiny_project.write_data(tmp_path, tiny_project.PARTS)
    params = tiny_project.write_params(tmp_path, train={**STEPS, **settings})
    assert marginalia("stage", "train") == 0
    assert not paths.CURVES.exists(), "the training draws nothing"
    assert marginalia("stage", "train_report") == 0
    drawn = [path.read_bytes() for path in (paths.CURVES, paths.PSEUDO_LABELS)]

    # The same from what the training had in memory.
    data = SplitData.read(manifest.read(paths.SPLIT_MANIFEST), atomic.read_json(paths.SPLIT_SUMMARY))
    curves.curves(measured, data.classes, paths.CURVES)
    images = train.images_of(data.unlabelled[:: max(1, len(data.unlabelled) // 6)][:6], params, data.ignore)
    method = train.prepare(params, data, None).task.method
    model, _ = segmenter.load(paths.STUDENT_WEIGHTS)
    bar = measured[-1].get("threshold", math.nan)
    curves.previews(model, images, method, params, data.classes, bar, paths.PSEUDO_LABELS)
    assert drawn == [path.read_bytes() for path in (paths.CURVES, paths.PSEUDO_LABELS)]
