"""A worse class, a tie, another test set."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.champions import gate, metrics
from pipeline.champions.scored import Scored
from pipeline.storage import atomic
from tests.support import tiny_settings
from tests.support.command_line import marginalia
from tests.support.tiny_gate import WRONG, counts, scored, write_run

GATE = tiny_settings.gate(bootstrap=400, class_floor=5.0)


def test_better_in_the_mean_worse_in_one_class_is_kept() -> None:
    new, old = counts((0.95, 0.95, 0.70)), counts((0.75, 0.75, 0.80))
    verdict = gate.judge(scored("b", new), scored("a", old), GATE)
    assert verdict.delta is not None
    assert verdict.delta > 3
    assert verdict.ci is not None
    assert verdict.ci[0] > 0  # the mean alone would promote it
    assert verdict.verdict == "kept"
    assert "lamp falls by" in verdict.reason
    assert verdict.per_class["lamp"].blocks
    assert (
        gate.judge(scored("b", new), scored("a", old), GATE.model_copy(update={"class_floor": 50.0})).verdict
        == "promoted"
    )


def test_a_guarded_class_blocks_a_smaller_fall() -> None:
    new, old = counts((0.95, 0.95, 0.775)), counts((0.75, 0.75, 0.80))
    unguarded = gate.judge(scored("b", new), scored("a", old), GATE.model_copy(update={"class_floor": 20.0}))
    assert unguarded.verdict == "promoted"
    fall = unguarded.per_class["lamp"].delta
    assert -20 < fall < 0
    for floor in (20.0, -1.9 * fall):  # the interval below 0; then beyond half the floor
        rules = GATE.model_copy(update={"class_floor": floor, "guarded": ("lamp",)})
        verdict = gate.judge(scored("b", new), scored("a", old), rules)
        assert verdict.verdict == "kept"
        assert "guarded lamp falls by" in verdict.reason
    calm = gate.judge(
        scored("b", new), scored("a", old), GATE.model_copy(update={"class_floor": 20.0, "guarded": ("road",)})
    )
    assert calm.verdict == "promoted"  # guarding a class that gains changes nothing


def test_a_tie_within_the_interval_keeps_the_champion() -> None:
    rng = np.random.default_rng(1)
    old = counts((0.8, 0.8, 0.7))
    new = old.copy()
    for i, c in enumerate(rng.integers(0, 3, 30)):  # a few pixels won or lost per image, one more won than lost
        step = 8 if i % 2 else -7
        new[i, c, c] += step
        new[i, c, WRONG[c]] -= step
    verdict = gate.judge(scored("b", new), scored("a", old), GATE)
    assert verdict.ci is not None
    assert verdict.ci[0] <= 0 <= verdict.ci[1]
    assert verdict.verdict == "kept"
    assert "not better beyond chance" in verdict.reason
    same = gate.judge(scored("b", old), scored("a", old), GATE)
    assert (same.verdict, same.delta, same.ci) == ("kept", 0.0, [0.0, 0.0])


def test_another_test_hash_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_settings.write(Path("params.yaml"), gate={"bootstrap": 50})
    first = write_run(tmp_path, "one", counts((0.8, 0.8, 0.7)))
    assert marginalia("stage", "gate") == 0
    write_run(tmp_path, "two", counts((0.9, 0.9, 0.9)), test_hash="t2")
    assert marginalia("stage", "gate") == 3
    assert "marginalia rescore" in " ".join(capsys.readouterr().out.split())
    said = atomic.read_json(Path("reports/gate.json"))
    assert said["verdict"] == "refused"
    assert "another test set" in said["reason"]
    assert atomic.read_json(Path("champions/champion.json"))["id"] == first


def test_other_images_or_classes_under_the_same_hash_are_refused_too() -> None:
    new, old = scored("b", counts((0.9, 0.9, 0.9))), scored("a", counts((0.8, 0.8, 0.7)))
    fewer = scored("a", old.confusion_NKK[:29])
    assert gate.judge(new, fewer, GATE).verdict == "refused"
    renamed = Scored("a", "t1", ("road", "tree", "sign"), old.images, old.confusion_NKK)
    verdict = gate.judge(new, renamed, GATE)
    assert verdict.verdict == "refused"
    assert "class lists differ" in verdict.reason
    assert metrics.miou(new.confusion_NKK.sum(0)) == verdict.miou
