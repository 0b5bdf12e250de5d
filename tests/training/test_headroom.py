"""The learning curve over a quarter, a half and all of the labels, on a small real project."""

import json

import pytest

from pipeline import paths
from tests.support import tiny_project
from training import headroom
from training.engine import trainer
from training.headroom import LearningCurve

SETTINGS = {
    "method": "s4mc", "steps": 2, "warmup_steps": 1, "batch_labelled": 2, "batch_unlabelled": 2, "crop": [64, 96],
    "val_every": 2, "checkpoint_every": 2,
}  # fmt: skip


def project(root, labelled, val=2):
    parts = [("labelled", "base", "a", labelled), ("val", "base", "v", val), ("test", "base", "t", 2)]
    tiny_project.write_data(root, [part for part in parts if part[3]])
    return tiny_project.write_params(root, train=SETTINGS)


def curve(quarter, half, everything):
    scores = {"quarter": quarter, "half": half, "all": everything}
    return LearningCurve(split_hash="s", steps=650, labels={"quarter": 9, "half": 18, "all": 35}, scores=scores)


def test_each_share_of_the_labels_is_trained_on_drawn_and_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = project(tmp_path, labelled=9)
    result = headroom.run(params, [3])
    found = headroom.measure(params, [3])
    assert found.labels == {"quarter": 2, "half": 4, "all": 9}
    assert all(0 <= score <= 100 for by_seed in found.scores.values() for score in by_seed.values())
    assert [sorted(by_seed) for by_seed in found.scores.values()] == [[3]] * 3
    written = json.loads((paths.HEADROOM / "curve.json").read_text())
    assert written == result.record
    assert written["verdict"] == found.verdict
    assert (paths.HEADROOM / "curve.png").stat().st_size > 5_000

    monkeypatch.setattr(trainer.Trainer, "train", None)  # whoever trains now fails
    assert headroom.measure(params, [3]) == found
    other = params.model_copy(update={"train": params.train.model_copy(update={"steps": 3})})
    with pytest.raises(TypeError):
        headroom.measure(other, [0, 1])


@pytest.mark.parametrize(("labelled", "val", "reason"), [(7, 2, "label 8 or more"), (8, 0, "set split.val")])
def test_without_enough_labels_or_without_val_the_error_says_what_to_do(tmp_path, monkeypatch, labelled, val, reason):
    monkeypatch.chdir(tmp_path)
    params = project(tmp_path, labelled, val)
    with pytest.raises(ValueError, match=reason):
        headroom.measure(params, [0])


def test_the_shares_of_one_seed_lie_in_each_other_and_seeds_draw_differently(tmp_path):
    rows = tiny_project.write_data(tmp_path, [("labelled", "base", "a", 20)])
    names = {s: {q: {r.name for r in headroom.subset(rows, q, s)} for q in headroom.SHARES.values()} for s in (0, 1)}
    for drawn in names.values():
        assert drawn[0.25] < drawn[0.5] < drawn[1.0]
        assert [len(v) for v in drawn.values()] == [5, 10, 20]
    assert names[0][0.5] != names[1][0.5]


def test_a_rising_curve_says_that_more_images_can_pay_and_about_how_much():
    found = curve({0: 39.0, 1: 41.0}, {0: 49.0, 1: 51.0}, {0: 54.0, 1: 56.0})
    assert found.comparison.headroom == pytest.approx(5)
    assert found.next_doubling == pytest.approx(2.5)  # 10, 5, and half of that again
    assert "more images can pay; about +2.5 for 70 labels" in found.verdict


def test_a_flat_curve_says_that_there_is_no_headroom():
    found = curve({0: 48.0, 1: 50.0}, {0: 49.0, 1: 51.0}, {0: 50.0, 1: 52.0})
    assert "no headroom here" in found.verdict
    assert found.comparison.has_headroom is False


def test_one_seed_gives_a_curve_and_no_verdict():
    assert "one seed has no scatter" in curve({0: 40.0}, {0: 50.0}, {0: 55.0}).verdict


@pytest.mark.parametrize(
    ("quarter", "half", "everything", "expected"),
    [(40, 50, 60, 10), (40, 50, 70, 20), (40, 50, 45, 0), (50, 40, 45, 5)],
)
def test_the_next_doubling_brings_no_more_than_the_last_and_no_less_than_nothing(quarter, half, everything, expected):
    assert curve({0: quarter}, {0: half}, {0: everything}).next_doubling == pytest.approx(expected)
