"""The stage evaluate on a small real project: numbers against a slow loop, files, errors, pictures."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import config
from pipeline.champions import metrics as scores
from pipeline.champions import store
from pipeline.imaging import resize
from pipeline.storage import atomic, manifest
from tests.support import tiny_project
from tests.support.command_line import marginalia
from training import evaluate, inference, metrics, warm_start
from training.models import segmenter
from training.reports import evaluation


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Params:
    monkeypatch.chdir(tmp_path)
    return tiny_project.write(tmp_path)


def test_stage_writes_scores_that_a_slow_loop_finds_too(project: config.Params) -> None:
    assert marginalia("stage", "evaluate") == 0
    said = atomic.read_json(Path("reports/scores.json"))
    model, _ = segmenter.load(Path("models/student/student.safetensors"))
    table = np.zeros((4, 4), np.int64)
    rows = [row for row in manifest.read(Path("data/split/manifest.parquet")) if row.split == "test"]
    for row in rows:
        image, truth = manifest.open_image(row, 10**6), manifest.open_mask(row, 10**6)
        assert truth is not None
        plan = resize.plan(*image.shape[:2], long_side=96, stride=32)
        tensor = torch.from_numpy(resize.apply(image, plan)).permute(2, 0, 1)[None].float()
        with torch.inference_mode():
            label = model(tensor).argmax(1)[0].numpy().astype(np.uint8)
        answer = resize.restore(label, plan)
        for t in range(4):
            for p in range(4):
                table[t, p] += int(((truth == t) & (answer == p)).sum())
    with np.load("reports/confusions.npz", allow_pickle=False) as arrays:
        assert arrays["confusion"].shape == (11, 4, 4)
        assert arrays["confusion"].dtype == np.int64
        # Batches of another size may round a near-tie differently: a handful of 70,000 pixels at most.
        assert np.abs(arrays["confusion"].sum(0) - table).sum() <= 20
        assert sorted(arrays["ids"]) == sorted(row.id for row in rows)
        assert Counter(map(str, arrays["groups"])) == {"d": 7, "e": 4}
        assert list(arrays["classes"]) == tiny_project.NAMES
        assert str(arrays["test_hash"]) == said["test_hash"] == "7" * 64
        assert str(arrays["weights"]) == said["weights"] == atomic.sha256(Path("models/student/student.safetensors"))
        exact = arrays["confusion"].sum(0)
    assert said["miou"] == pytest.approx(scores.miou(exact))
    assert said["miou_all"] == pytest.approx(scores.miou_all(exact))
    for c, name in enumerate(tiny_project.NAMES):
        row = said["per_class"][name]
        assert row["iou"] == pytest.approx(100 * scores.iou(exact)[c])
        assert row["precision"] == pytest.approx(100 * exact[c, c] / exact[:, c].sum())
        assert row["recall"] == pytest.approx(100 * exact[c, c] / exact[c].sum())
        assert row["ci"][0] <= row["iou"] <= row["ci"][1]
        assert row["pixels"] == exact[c].sum()
    assert said["miou_ci"][0] < said["miou"] < said["miou_ci"][1]
    assert said["last"]["miou"] == said["miou"]
    assert said["best"]["weights"] != said["last"]["weights"]
    assert said["best"]["miou"] < said["miou"]  # the earlier network is worse
    assert said["last"]["val_miou"] > said["best"]["val_miou"]
    assert (said["chosen"], said["test_images"], said["stride"]) == ("last", 11, 32)
    assert said["miou"] > 50  # it learnt: the other checks are not about noise


def test_pictures_tables_and_card(project: config.Params) -> None:
    assert marginalia("stage", "evaluate") == 0
    folder = Path("reports/evaluate")
    pictures = {p.name for p in folder.glob("*.png")}
    assert pictures == {"confusion.png", "classes.png", "calibration.png", *(f"overlay_{i:02d}.png" for i in range(3))}
    for name in pictures:
        with Image.open(folder / name) as image:
            assert min(image.size) > 200
            assert len(set(image.convert("L").resize((64, 64)).get_flattened_data())) > 10, f"{name} is blank"
    with (folder / "confusion.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["actual"] for row in rows) == dict.fromkeys(tiny_project.NAMES, 200)
    with (folder / "classes.csv").open() as file:
        assert [row["class"] for row in csv.DictReader(file)] == tiny_project.NAMES
    card = Path("reports/model_card.md").read_text()
    said = atomic.read_json(Path("reports/scores.json"))
    for wanted in (f"{said['miou']:.2f}", "lamp", "ignore", said["test_hash"][:12], "Limits"):
        assert wanted in card


def test_worst_image_is_drawn_first(project: config.Params) -> None:
    model, meta = segmenter.load(Path("models/student/student.safetensors"))
    result = evaluate.score_split(model, meta, "test", project)
    drawn = [right for _, _, right in evaluate.previews(model, meta, result, project)]
    accuracy = [float(np.trace(t.confusion_KK) / t.confusion_KK.sum()) for t in result.tallies]
    assert drawn[:2] == sorted(accuracy)[:2]
    assert len(drawn) == 3


def test_confusion_rows_keep_the_shares() -> None:
    rows = Counter(evaluation.confusion_rows(np.array([[9, 1, 0], [0, 0, 0], [1, 1, 1]]), ["a", "b", "c"]))
    assert rows[("a", "a")] == 180
    assert rows[("a", "b")] == 20
    assert not any(actual == "b" for actual, _ in rows)
    assert sorted(rows[("c", p)] for p in "abc") == [66, 67, 67]
    uneven = Counter(evaluation.confusion_rows(np.array([[5, 2], [0, 1]]), ["a", "b"]))
    assert (uneven[("a", "a")], uneven[("a", "b")]) == (143, 57)  # 142.86 and 57.14


def test_answer_rounds_the_highest_probability() -> None:
    logits = torch.randn(2, 6, 5, 7, dtype=torch.float64) * 3
    label, confidence = inference.answer(logits)
    probability = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    assert label.dtype == confidence.dtype == torch.uint8
    assert (label == probability.argmax(1)).all()
    assert (confidence.double() - 255 * probability.amax(1)).abs().max() <= 0.5001


def test_batches_hold_each_image_once_in_equal_shapes(project: config.Params) -> None:
    rows = manifest.read(Path("data/split/manifest.parquet"))
    batches = inference.plan_batches(rows, tiny_project.INPUT, 4)
    assert sorted(r.id for b in batches for r in b) == sorted(r.id for r in rows)
    assert max(map(len, batches)) == 4
    for batch in batches:
        plans = {resize.plan(r.height, r.width, long_side=96, stride=32) for r in batch}
        assert len({(p.padded_height, p.padded_width) for p in plans}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split_hash": "0" * 64}, "trained on split 555555555555"),
        ({"classes": tiny_project.CLASSES[:3]}, "trained for classes"),
        ({"ignore": 254}, "trained for classes"),
    ],
)
def test_weights_of_another_split_or_other_classes_are_refused(
    project: config.Params, capsys: pytest.CaptureFixture[str], change: dict[str, object], message: str
) -> None:
    summary = Path("data/split/summary.json")
    atomic.write_json(summary, atomic.read_json(summary) | change)
    assert marginalia("stage", "evaluate") == 1
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not Path("reports/scores.json").exists()


def test_no_test_image_and_missing_mask_are_named(
    project: config.Params, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny_project.write_data(tmp_path, [("labelled", "base", "a", 2)])
    assert marginalia("stage", "evaluate") == 1
    assert "the test split has no image" in capsys.readouterr().err
    rows = tiny_project.write_data(tmp_path, [("unlabelled", "base", "a", 1)])
    with pytest.raises(inference.MaskError, match=r"a/base000.*no mask"):
        inference.read(rows[0], tiny_project.INPUT, 10**6, mask=True)


def test_champion_is_scored_again_on_todays_test_split(project: config.Params) -> None:
    home = Path("champions/old")
    (home / "bundle").mkdir(parents=True)
    segmenter.save(
        home / "student.safetensors", tiny_project.trained(8).state_dict(), tiny_project.meta() | {"split_hash": "1"}
    )
    record = {"id": "old", "bundle": "champions/old/bundle", "student": "champions/old/student.safetensors"}
    atomic.write_json(Path("champions/champion.json"), record)
    assert marginalia("rescore") == 0
    said = json.loads((home / "scores.json").read_text())
    assert said["test_hash"] == "7" * 64
    with np.load(home / "confusions.npz", allow_pickle=False) as arrays:
        assert scores.miou(arrays["confusion"].sum(0)) == pytest.approx(said["miou"])
    judged = next(r.id for r in manifest.read(Path("data/split/manifest.parquet")) if r.split == "test")
    seen = tiny_project.meta() | {"trained_on": warm_start.short_ids([judged])}
    segmenter.save(home / "student.safetensors", tiny_project.trained(8).state_dict(), seen)
    assert marginalia("rescore") == 1  # it has been trained on an image that would judge it
    Path("champions/champion.json").unlink()
    assert store.read_champion(Path("champions")) is None
    assert marginalia("rescore") == 1


def test_scores_of_no_pixel_are_none_not_nan() -> None:
    empty = metrics.Tally(np.zeros((4, 4), int), np.zeros((3, 4), int), np.zeros((256, 2), int))
    assert metrics.summary(empty).miou is None
    assert metrics.summary(empty).boundary_iou is None
