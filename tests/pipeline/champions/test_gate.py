"""The gate's judgement against closed cases, its chain of custody, promotion under kills at every file operation."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from pipeline.champions import alpha_spending, gate, metrics, rollback, store
from pipeline.champions.scored import Scored
from pipeline.storage import atomic
from tests.support import tiny_settings
from tests.support.command_line import marginalia
from tests.support.crash_points import killed_at
from tests.support.tiny_gate import NAMES, counts, scored, write_run

GATE = tiny_settings.gate(bootstrap=400)
GOOD, BETTER = (0.80, 0.80, 0.70), (0.86, 0.84, 0.74)


def test_first_champion_needs_only_the_minimum() -> None:
    challenger = scored("a", counts(GOOD))
    assert gate.judge(challenger, None, GATE).verdict == "promoted"
    low = gate.judge(challenger, None, GATE.model_copy(update={"minimum_miou": 99.0}))
    assert low.verdict == "kept"
    assert "gate.minimum_miou 99" in low.reason


def test_clearly_better_is_promoted_and_the_numbers_are_the_slow_ones() -> None:
    new, old = counts(BETTER), counts(GOOD)
    verdict = gate.judge(scored("b", new), scored("a", old), GATE)
    assert verdict.verdict == "promoted"
    assert verdict.delta == pytest.approx(metrics.miou(new.sum(0)) - metrics.miou(old.sum(0)))
    weights = np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), size=400)
    drawn = []
    for row in weights:  # the same drawn images for both: that is what makes it paired
        pair = [sum(conf[i] * n for i, n in enumerate(row)) for conf in (new, old)]
        drawn.append(metrics.miou(pair[0]) - metrics.miou(pair[1]))
    assert verdict.ci == pytest.approx(list(np.quantile(drawn, [0.025, 0.975])))
    assert set(verdict.per_class) == set(NAMES)


def test_pairing_makes_the_interval_narrow() -> None:
    """Both models find the same images hard: unpaired, this gain would drown in the spread over images."""
    rng = np.random.default_rng(3)
    hard = rng.uniform(0.2, 0.95, 30)
    pair = [np.zeros((30, 3, 3), np.int64) for _ in range(2)]
    for conf, gain in zip(pair, (0.01, 0.0), strict=True):
        for i in range(30):
            right = round(1000 * (hard[i] + gain))
            conf[i] = np.diag([right] * 3) + np.roll(np.diag([1000 - right] * 3), 1, axis=1)
    verdict = gate.judge(scored("b", pair[0]), scored("a", pair[1]), GATE)
    assert verdict.verdict == "promoted"
    alone = metrics.interval(100 * metrics.mean_present(metrics.bootstrap(pair[0], samples=400, seed=0)), 0.95)
    assert alone is not None
    assert verdict.ci is not None
    assert verdict.ci[1] - verdict.ci[0] < 0.1 * (alone.high - alone.low)


def test_worse_is_kept_and_image_order_does_not_matter() -> None:
    assert gate.judge(scored("b", counts(GOOD)), scored("a", counts(BETTER)), GATE).verdict == "kept"
    order = np.random.default_rng(0).permutation(30)
    shuffled = Scored("a", "t1", NAMES, tuple(f"{i:02d}" for i in order), counts(GOOD)[order])
    straight = gate.judge(scored("b", counts(BETTER)), scored("a", counts(GOOD)), GATE)
    assert gate.judge(scored("b", counts(BETTER)), shuffled, GATE) == straight


def test_one_test_image_proves_nothing() -> None:
    verdict = gate.judge(scored("b", counts(BETTER)[:1]), scored("a", counts(GOOD)[:1]), GATE)
    assert verdict.verdict == "kept"
    assert "one test image" in verdict.reason


def test_a_class_absent_from_the_test_set_is_reported_as_none() -> None:
    new, old = counts(BETTER), counts(GOOD)
    for conf in (new, old):
        conf[:, 2, :], conf[:, :, 2] = 0, 0
    verdict = gate.judge(scored("b", new), scored("a", old), GATE)
    assert verdict.verdict == "promoted"
    assert verdict.per_class["lamp"].model_dump() == {
        "delta": None, "ci": None, "challenger": None, "champion": None, "guarded": False, "blocks": False,
    }  # fmt: skip


def test_unknown_guarded_class_is_an_error() -> None:
    with pytest.raises(gate.GateError, match=r"gate\.guarded names \['tre'\]"):
        gate.judge(scored("b", counts(GOOD)), None, GATE.model_copy(update={"guarded": ("tre",)}))


def test_run_promotes_then_keeps_the_same_bundle(tmp_path: Path) -> None:
    id = write_run(tmp_path, "one", counts(GOOD))
    assert gate.run(tmp_path, GATE).verdict == "promoted"
    pointer = atomic.read_json(tmp_path / "champions/champion.json")
    assert pointer["id"] == id
    assert pointer["previous"] is None
    home = tmp_path / "champions" / id
    assert store.check_bundle(tmp_path / pointer["bundle"]) == id
    assert (tmp_path / pointer["student"]).read_bytes() == b"weights one"
    assert {p.name for p in home.iterdir()} == {"bundle", "student.safetensors", "scores.json", "confusions.npz"}
    again = gate.run(tmp_path, GATE)
    assert again.verdict == "kept"
    assert "the champion already" in again.reason
    assert len((tmp_path / "champions/history.jsonl").read_text().splitlines()) == 1
    second = write_run(tmp_path, "two", counts(BETTER))
    assert gate.run(tmp_path, GATE).verdict == "promoted"
    pointer = atomic.read_json(tmp_path / "champions/champion.json")
    assert (pointer["id"], pointer["previous"]) == (second, id)
    assert home.is_dir()  # the old one stays to go back to
    history = [json.loads(line)["id"] for line in (tmp_path / "champions/history.jsonl").read_text().splitlines()]
    assert history == [id, second]
    said = atomic.read_json(tmp_path / "reports/gate.json")
    assert (said["verdict"], said["challenger"], said["champion"]) == ("promoted", second, id)


def test_failed_parity_and_foreign_parts_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "one", counts(GOOD), passed=False)
    verdict = gate.run(tmp_path, GATE)
    assert verdict.verdict == "refused"
    assert "'lamp' agrees on 0.5" in verdict.reason
    assert not (tmp_path / "champions").exists()
    write_run(tmp_path, "one", counts(GOOD))
    report = atomic.read_json(tmp_path / "reports/parity.json")
    atomic.write_json(tmp_path / "reports/parity.json", report | {"bundle": "of another run"})
    assert "run the parity stage again" in gate.run(tmp_path, GATE).reason
    write_run(tmp_path, "one", counts(GOOD))
    (tmp_path / "models/student/student.safetensors").write_bytes(b"other weights")
    assert gate.run(tmp_path, GATE).verdict == "refused"
    assert not (tmp_path / "champions").exists()


@pytest.mark.parametrize("harm", ["changed", "missing", "extra"])
def test_damaged_bundle_is_named(tmp_path: Path, harm: str) -> None:
    write_run(tmp_path, "one", counts(GOOD))
    model = tmp_path / "bundle/model.onnx"
    if harm == "changed":
        model.write_bytes(b"graph two")
    elif harm == "missing":
        model.unlink()
    else:
        model.with_name("model.onnx.data").write_bytes(b"x")
    with pytest.raises(store.ChampionError, match=r"model\.onnx"):
        gate.run(tmp_path, GATE)


def test_missing_inputs_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_settings.write(Path("params.yaml"), gate={"bootstrap": 50})
    assert marginalia("stage", "gate") == 1
    assert "student.safetensors: not found" in capsys.readouterr().err
    write_run(tmp_path, "one", counts(GOOD))
    Path("reports/confusions.npz").unlink()
    assert marginalia("stage", "gate") == 1
    assert "confusions.npz: not found; run the evaluate stage" in capsys.readouterr().err
    id = write_run(tmp_path, "one", counts(GOOD))
    assert marginalia("stage", "gate") == 0
    shutil.rmtree(Path("champions") / id)
    write_run(tmp_path, "two", counts(BETTER))
    assert marginalia("stage", "gate") == 1
    assert "is gone" in capsys.readouterr().err


def test_what_is_damaged_is_named_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_settings.write(Path("params.yaml"), gate={"bootstrap": 50})
    id = write_run(tmp_path, "one", counts(GOOD))
    assert marginalia("stage", "gate") == 0
    write_run(tmp_path, "two", counts(BETTER))
    whole = Path("reports/confusions.npz").read_bytes()
    with np.load("reports/confusions.npz") as arrays:
        flat = {key: arrays[key] for key in arrays} | {"confusion": np.zeros(3)}
    with atomic.replacing(tmp_path / "flat.npz") as file:
        np.savez(file, **flat)
    harms = [b"[1]", b"not json", b"{}", b'{"id": 5, "bundle": "b", "student": "s"}', b"\xff"]
    cases = [(f"champions/{name}", harm) for name in ("champion.json", f"{id}/scores.json") for harm in harms]
    cases += [("reports/scores.json", harm) for harm in harms]
    cases += [("reports/parity.json", b"[1]"), ("bundle/SHA256SUMS", b"\xff")]
    torn = (b"", b"PK\x03\x04", whole[: len(whole) // 2], whole.replace(b"ids.npy", b"ibs.npy"), b"\x80\x04.")
    for file in ("reports/confusions.npz", f"champions/{id}/confusions.npz"):
        cases += [(file, harm) for harm in (*torn, (tmp_path / "flat.npz").read_bytes())]
    pointed = Path("champions/champion.json").read_bytes()
    for name, harm in cases:
        before = Path(name).read_bytes()
        Path(name).write_bytes(harm)
        capsys.readouterr()
        assert marginalia("stage", "gate") == 1, (name, harm)
        told = capsys.readouterr().err
        assert Path(name).parent.name in told, (name, harm)
        assert " run " in told, (name, harm)
        assert told.count("\n") == 1
        Path(name).write_bytes(before)
        assert Path("champions/champion.json").read_bytes() == pointed
    assert marginalia("stage", "gate") == 0
    assert atomic.read_json(Path("reports/gate.json"))["verdict"] == "promoted"


@pytest.mark.parametrize("harm", ["bundle", "model", "student", "scores"])
def test_the_champions_own_files_are_healed_from_the_same_bundle(tmp_path: Path, harm: str) -> None:
    id = write_run(tmp_path, "one", counts(GOOD))
    gate.run(tmp_path, GATE)
    home = tmp_path / "champions" / id
    wanted = {p.relative_to(home): p.read_bytes() for p in home.rglob("*") if p.is_file()}
    if harm == "bundle":
        shutil.rmtree(home)
    elif harm == "model":
        (home / "bundle/model.onnx").write_bytes(b"graph of nobody")
    elif harm == "student":
        (home / "student.safetensors").unlink()
    else:
        (home / "scores.json").write_bytes(b"[1]")
    verdict = gate.run(tmp_path, GATE, experiment="try-1")
    assert (verdict.verdict, "written again" in verdict.reason) == ("kept", False)  # an experiment touches nothing
    verdict = gate.run(tmp_path, GATE)
    assert verdict.verdict == "kept"
    assert "written again" in verdict.reason
    assert {p.relative_to(home): p.read_bytes() for p in home.rglob("*") if p.is_file()} == wanted
    pointer = store.read_champion(tmp_path / "champions")
    assert pointer is not None
    assert (pointer.id, pointer.previous) == (id, None)
    assert "written again" not in gate.run(tmp_path, GATE).reason


def test_a_repair_says_so_and_keeps_what_the_champion_won_by(tmp_path: Path) -> None:
    write_run(tmp_path, "one", counts(GOOD))
    gate.run(tmp_path, GATE)
    id = write_run(tmp_path, "two", counts(BETTER))
    gate.run(tmp_path, GATE)
    file = tmp_path / "champions/champion.json"
    won = atomic.read_json(file)
    assert won["delta"] > 0
    for day in (5, 6):
        (tmp_path / "champions" / id / "student.safetensors").unlink()
        gate.run(tmp_path, GATE, now=lambda day=day: datetime(2026, 1, day, tzinfo=UTC))
        now = atomic.read_json(file)
        assert now == won | {"repaired_at": f"2026-01-0{day}T00:00:00+00:00", "repaired": now["repaired"]}
        assert "student.safetensors: missing" in now["repaired"]
    lines = (tmp_path / "champions/history.jsonl").read_text().splitlines()
    assert [json.loads(line).get("repaired_at", "")[:10] for line in lines] == ["", "", "2026-01-05", "2026-01-06"]


def test_a_lost_champions_folder_is_promoted_again(tmp_path: Path) -> None:
    """A fresh clone, or `rm -rf champions`: reports/gate.json is there and must not matter."""
    id = write_run(tmp_path, "one", counts(GOOD))
    gate.run(tmp_path, GATE)
    gate.run(tmp_path, GATE)
    assert atomic.read_json(tmp_path / "reports/gate.json")["verdict"] == "kept"
    shutil.rmtree(tmp_path / "champions")
    assert gate.run(tmp_path, GATE).verdict == "promoted"
    pointer = store.read_champion(tmp_path / "champions")
    assert pointer is not None
    assert store.check_bundle(tmp_path / pointer.bundle) == id


def test_an_experiment_never_moves_the_champion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dvc exp run` sets DVC_EXP_NAME and DVC_ROOT, also where the stages run in a temporary copy."""
    project, copy = tmp_path / "project", tmp_path / "copy"
    write_run(project, "one", counts(GOOD))
    gate.run(project, GATE)
    write_run(copy, "two", counts(BETTER))
    before = {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}
    tiny_settings.write(copy / "params.yaml", gate={"bootstrap": 400})
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_EXP_NAME", "odd-idea")
    monkeypatch.setenv("DVC_ROOT", str(project))
    assert marginalia("stage", "gate") == 0
    said = atomic.read_json(copy / "reports/gate.json")
    assert said["verdict"] == "kept"
    assert "`dvc exp apply odd-idea` and then `dvc repro -f -s gate`" in said["reason"]
    honest = gate.judge(scored("b", counts(BETTER)), scored("a", counts(GOOD)), GATE)
    assert (said["delta"], said["ci"], said["per_class"]) == (honest.delta, honest.ci, honest.model_dump()["per_class"])
    assert not (copy / "champions").exists()
    assert {p: p.read_bytes() for p in project.rglob("*") if p.is_file()} == before
    monkeypatch.delenv("DVC_EXP_NAME")
    monkeypatch.chdir(project)
    tiny_settings.write(project / "params.yaml", gate={"bootstrap": 400})
    write_run(project, "two", counts(BETTER))
    assert marginalia("stage", "gate") == 0
    assert atomic.read_json(project / "reports/gate.json")["verdict"] == "promoted"


@pytest.mark.parametrize("again_of_a_former", [False, True])
def test_a_kill_at_any_point_leaves_a_valid_champion(tmp_path: Path, again_of_a_former: bool) -> None:
    start = tmp_path / "start"
    old = write_run(start, "one", counts(GOOD))
    gate.run(start, GATE)
    new = write_run(start, "two", counts(BETTER))
    if again_of_a_former:  # its folder lies there already, complete
        shutil.copytree(start / "champions" / old, start / "champions" / new)
    points, pointed_old, pointed_new = 0, 0, 0
    while True:
        points += 1
        root = tmp_path / f"k{points}"
        shutil.copytree(start, root)
        killed = killed_at(points, lambda root=root: gate.run(root, GATE))
        record = store.read_champion(root / "champions")
        assert record is not None
        store.check_bundle(root / record.bundle)
        assert (root / record.student).exists()
        pointed_old, pointed_new = pointed_old + (record.id == old), pointed_new + (record.id == new)
        verdict = gate.run(root, GATE)  # what the next `dvc repro` does
        assert verdict.verdict == ("promoted" if record.id == old else "kept")
        assert store.read_champion(root / "champions").id == new
        assert store.check_bundle(root / f"champions/{new}/bundle") == new
        history = [json.loads(line)["id"] for line in (root / "champions/history.jsonl").read_text().splitlines()]
        assert history == [old, new]
        assert not list((root / "champions").glob(".new-*"))
        shutil.rmtree(root)
        if not killed:
            break
    assert points > 15
    assert pointed_old > 5
    assert pointed_new > 2


FP32, INT8 = "onnxruntime cpu fp32", "openvino cpu int8"


def test_the_champions_network_exported_anew_takes_its_place(tmp_path: Path) -> None:
    """It answers alike, so no comparison is spent on it; and what it offers is why."""
    write_run(tmp_path, "one", counts(GOOD), forms=[FP32])
    gate.run(tmp_path, GATE)
    write_run(tmp_path, "again", counts(GOOD), weights_of="one", forms=[FP32])
    assert gate.run(tmp_path, GATE).verdict == "kept"  # only another file: no reason to change
    spent = alpha_spending.read_comparisons(tmp_path / "champions")
    id = write_run(tmp_path, "int8", counts(GOOD), weights_of="one", forms=[FP32, INT8])
    assert gate.run(tmp_path, GATE, experiment="try-1").verdict != "promoted"
    verdict = gate.run(tmp_path, GATE)
    assert (verdict.verdict, verdict.comparison) == ("promoted", None)
    assert verdict.reason.endswith(f"exported anew with {INT8}")
    assert alpha_spending.read_comparisons(tmp_path / "champions") == spent
    pointer = store.read_champion(tmp_path / "champions")
    assert pointer is not None
    assert pointer.id == id
    assert pointer.previous is not None
    write_run(tmp_path, "bare", counts(GOOD), weights_of="one", forms=[FP32])
    assert gate.run(tmp_path, GATE).verdict == "kept"  # a form that this machine lacks, or found slow today


def test_exported_anew_it_does_not_undo_a_rollback(tmp_path: Path) -> None:
    write_run(tmp_path, "one", counts(GOOD), forms=[FP32])
    gate.run(tmp_path, GATE)
    write_run(tmp_path, "int8", counts(GOOD), weights_of="one", forms=[FP32, INT8])
    assert gate.run(tmp_path, GATE).verdict == "promoted"
    rollback.run(tmp_path)
    write_run(tmp_path, "int8-again", counts(GOOD), weights_of="one", forms=[FP32, INT8])
    assert gate.run(tmp_path, GATE).verdict == "kept"


@pytest.mark.parametrize("harm", ["student.safetensors", "bundle/bundle.json"])
def test_a_hole_in_the_champions_folder_stops_no_other_challenger(tmp_path: Path, harm: str) -> None:
    id = write_run(tmp_path, "one", counts(GOOD), forms=[FP32])
    gate.run(tmp_path, GATE)
    (tmp_path / "champions" / id / harm).write_bytes(b"{")
    write_run(tmp_path, "two", counts(BETTER), forms=[FP32])
    assert gate.run(tmp_path, GATE).verdict == "promoted"


@pytest.mark.parametrize("other", [{"weights_of": "two"}, {"weights_of": "one", "test_hash": "t2"}])
def test_what_is_not_the_champions_network_is_judged(tmp_path: Path, other: dict[str, str]) -> None:
    write_run(tmp_path, "one", counts(GOOD), forms=[FP32])
    gate.run(tmp_path, GATE)
    write_run(tmp_path, "int8", counts(GOOD), forms=[FP32, INT8], **other)
    assert "exported anew" not in gate.run(tmp_path, GATE).reason
