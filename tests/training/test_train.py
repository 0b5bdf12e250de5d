"""The training stage's wiring on a small real project: what it starts from, what it has seen, what measures it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import config
from pipeline.records.training import TrainingSummary
from pipeline.storage import manifest
from tests.support import tiny_project
from tests.support.command_line import marginalia
from training import train, warm_start
from training.engine import checkpoint, source_identity, trainer
from training.models.segmenter import WeightsError
from training.split_data import SplitData

PARTS = (
    ("labelled", "base", "a", 3),
    ("unlabelled", "base", "b", 3),
    ("val", "base", "v", 2),
    ("test", "base", "t", 2),
)
SETTINGS = {
    "method": "s4mc", "steps": 4, "warmup_steps": 1, "batch_labelled": 2, "batch_unlabelled": 2, "crop": [64, 96],
    "val_every": 2, "checkpoint_every": 2,
}  # fmt: skip


ENDED = TrainingSummary(
    method="s4mc", preset="paper", steps=4, seed=0, best_step=None, val_miou=None, kept=0.5, precision=0.25,
    precision_on="hidden labels", labelled=3, unlabelled=3, pseudo_labels=None, seconds=1.5, warm_start=None, torch="2",
    machine="m", device="cpu", split_hash="s", data_hash="d",
)  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch):
    """(params, rows): images on disk, cwd there."""
    monkeypatch.chdir(tmp_path)
    rows = tiny_project.write_data(tmp_path, PARTS)
    return tiny_project.write_params(tmp_path, train=SETTINGS), rows


def data_of(rows, **changes):
    summary = {"classes": tiny_project.CLASSES, "ignore": 255, "split_hash": "s", "data_hash": "d", **changes}
    return SplitData.read(rows, summary)


def fit(params, data, work, start_at=None):
    ready = train.prepare(params, data, start_at)
    result = trainer.Trainer(ready.task, params.train, log_every=2, work=work).train()
    return ready, result


@pytest.mark.parametrize(("labelled", "unlabelled"), [(1, 0), (3, 1)])
def test_few_images_or_none_unlabelled_still_train(project, tmp_path, labelled, unlabelled):
    params, rows = project
    use = {"labelled": labelled, "unlabelled": unlabelled}
    kept = [
        r
        for split in ("labelled", "unlabelled", "val")
        for r in [r for r in rows if r.split == split][: use.get(split, 9)]
    ]
    _, result = fit(params, data_of(kept), tmp_path / "w")
    assert all(v.isfinite().all() for v in result.teacher.values())
    assert 0 <= result.history[-1]["kept"] <= 1


def test_no_labelled_image_is_an_error_that_says_what_to_do(project):
    params, rows = project
    with pytest.raises(ValueError, match=r"data\.lists\.labelled"):
        train.prepare(params, data_of([r for r in rows if r.split != "labelled"]), None)


def test_precision_is_measured_on_hidden_labels_where_there_are_any(project):
    params, rows = project
    own = next(r for r in rows if r.split == "labelled")
    mask = {"mask_shard": own.mask_shard, "mask_offset": own.mask_offset, "mask_length": own.mask_length}
    rows = [replace(r, **mask) if r.split == "unlabelled" else r for r in rows]
    ready = train.prepare(params, data_of(rows), None)
    pool = ready.task.batches.unlabelled
    own = [i for i, row in enumerate(pool.rows) if row.split == "labelled"]
    assert len(own) == 3
    assert all((pool[i].label_HW == 255).all() for i in own)
    assert ready.precision_on == "hidden labels"
    blind = [
        replace(r, mask_shard=None, mask_offset=None, mask_length=None) if r.split == "unlabelled" else r for r in rows
    ]
    ready = train.prepare(params, data_of(blind), None)
    assert ready.precision_on == "labels it trains on"
    assert any((ready.task.batches.unlabelled[i].label_HW != 255).any() for i in range(6))


def test_the_ceiling_trains_on_the_hidden_labels_of_unlabelled_images_and_on_no_others(project):
    params, rows = project
    ceiling = params.model_copy(update={"train": params.train.model_copy(update={"method": "ceiling"})})
    with pytest.raises(ValueError, match="none has a mask"):
        train.prepare(ceiling, data_of(rows), None)
    own = next(r for r in rows if r.split == "labelled")
    mask = {"mask_shard": own.mask_shard, "mask_offset": own.mask_offset, "mask_length": own.mask_length}
    with_mask, *without = [r for r in rows if r.split == "unlabelled"]
    rows = [replace(r, **mask) if r is with_mask else r for r in rows]
    assert without
    ready = train.prepare(ceiling, data_of(rows), None)
    expected = [r.id for r in rows if r.split == "labelled"] + [with_mask.id]
    assert [row.id for row in ready.task.batches.labelled.rows] == expected
    assert ready.task.method.threshold is None
    assert ready.seen == train.prepare(params, data_of(rows), None).seen
    assert ready.task.identity != train.prepare(params, data_of(rows), None).task.identity


def test_labels_and_code_are_part_of_a_runs_identity(project, monkeypatch):
    params, rows = project
    one, two = (train.prepare(params, data_of(rows, label_hash=h), None).task.identity for h in ("x", "y"))
    assert one != two
    monkeypatch.setattr(source_identity, "digest", lambda architecture: "other")
    assert train.prepare(params, data_of(rows, label_hash="x"), None).task.identity != one


def test_unfinished_runs_of_other_settings_are_named_with_what_differs(tmp_path):
    params = {"model": {"encoder": "x"}, "train": {"seed": 0, "steps": 9}}
    ours = {"params": params, "code": "a", "start": None}
    others = {
        "seed": {**ours, "params": {**params, "train": {"seed": 1, "steps": 9}}},
        "two": {**ours, "params": {**params, "train": {"seed": 0}}, "code": "b"},
    }
    for step, identity in enumerate([ours, *others.values()]):
        state = {"identity": checkpoint.describe(identity), "step": step, "weight": torch.zeros(300_000)}
        checkpoint.save(checkpoint.folder(identity, tmp_path) / "checkpoint.pt", state)
    found = {run.folder: run for run in checkpoint.unfinished(ours, tmp_path)}
    assert found.keys() == {checkpoint.folder(identity, tmp_path) for identity in others.values()}
    one, two = (found[checkpoint.folder(identity, tmp_path)] for identity in others.values())
    assert (one.step, one.differs) == (1, ("train.seed",))
    assert (two.step, two.differs) == (2, ("code", "train.steps"))
    line = (
        f"{two.folder}: an unfinished run at step 2, which differs in code, train.steps; 1.2 MB; will not be continued"
    )
    assert str(two) == f"{line} and may be deleted"
    assert checkpoint.unfinished(ours, tmp_path / "none") == []


@pytest.mark.parametrize("kind", ["empty", "torn", "noise", "another program's"])
def test_a_damaged_checkpoint_of_another_run_is_reported_and_nothing_more(tmp_path, kind):
    path = tmp_path / "abc/checkpoint.pt"
    checkpoint.save(path, {"identity": checkpoint.describe({"a": 1}), "step": 3, "weight": torch.zeros(1000)})
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "torn": whole[:-200], "noise": bytes(range(256)) * 8}.get(kind, whole))
    if kind == "another program's":
        torch.save({"epoch": 3}, path)
    (run,) = checkpoint.unfinished({"a": 2}, tmp_path)
    assert (run.step, run.differs, run.size) == (None, (), path.stat().st_size)
    assert str(run).startswith(f"{path.parent}: an unreadable checkpoint; 0.0 MB; will not be continued")


def test_the_stage_says_so_before_it_trains(project, tmp_path, monkeypatch, capsys):
    params, _ = project
    checkpoint.save(checkpoint.WORK / "abc/checkpoint.pt", {"identity": '{"data": "e"}', "step": 7})

    def stop(*args, **kwargs):
        raise trainer.Interrupted("stop")

    monkeypatch.setattr(trainer.Trainer, "train", stop)
    with pytest.raises(trainer.Interrupted):
        train.stage(params)
    said = capsys.readouterr().err
    assert "warning: .marginalia/work/abc: an unfinished run at step 7, which differs in code, data, params" in said
    assert len([line for line in said.splitlines() if "work/abc" in line]) == 1


def champion(root: Path, rows, trained_on):
    model = tiny_project.trained()
    path = root / "champions/c1/student.safetensors"
    from training.models import segmenter

    segmenter.save(path, model.state_dict(), {**tiny_project.meta(), "trained_on": warm_start.short_ids(trained_on)})
    (root / "dumps.yaml").write_text("warm_start: c1\ndumps: {base: {archive: x}}\n")
    return path


def test_a_warm_start_begins_with_the_champions_weights_and_inherits_what_it_saw(project, tmp_path):
    params, rows = project
    path = champion(tmp_path, rows, ["f" * 64])
    assert warm_start.champion() == Path("champions/c1/student.safetensors")
    ready = train.prepare(params, data_of(rows), path)
    assert all(torch.equal(v, tiny_project.trained().state_dict()[k]) for k, v in ready.task.model.state_dict().items())
    assert ready.seen.split() == sorted({r.id[:16] for r in rows if r.split in ("labelled", "unlabelled")} | {"f" * 16})


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_warm_start_that_has_seen_a_judged_image_is_refused(project, tmp_path, split):
    params, rows = project
    seen = next(r.id for r in rows if r.split == split)
    path = champion(tmp_path, rows, [seen, "f" * 64])
    with pytest.raises(WeightsError, match=r"1 images .* val or test .*warm_start: null"):
        train.prepare(params, data_of(rows), path)


def test_a_warm_start_with_other_classes_or_without_its_file_is_refused(project, tmp_path):
    params, rows = project
    path = champion(tmp_path, rows, [])
    other = [{**c, "name": c["name"].upper()} for c in tiny_project.CLASSES]
    with pytest.raises(WeightsError, match="SKY"):
        train.prepare(params, data_of(rows, classes=other), path)
    path.unlink()
    with pytest.raises(config.ConfigError, match=r"warm_start.*c1"):
        warm_start.champion()


def test_a_full_card_is_one_message_with_what_to_change(project, monkeypatch, capsys):
    def full(params):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train, "stage", full)
    monkeypatch.setattr("sys.argv", ["train"])
    assert marginalia("stage", "train") == 1
    said = capsys.readouterr().err
    assert "Tried to allocate 2.00 GiB" in said
    assert "train.accumulate: 2" in said


def test_a_changed_image_stops_training_with_its_name(project):
    params, rows = project
    first, second = [r for r in rows if r.split == "labelled"][:2]
    swapped = [replace(r, offset=second.offset, length=second.length) if r is first else r for r in rows]
    ready = train.prepare(params, data_of(swapped), None)
    with pytest.raises(manifest.ManifestError, match=first.name):
        [ready.task.batches.labelled[i] for i in range(3)]


def test_a_training_says_what_history_will_tell(project):
    params, _ = project
    said = train.with_lineage(ENDED, params, {"dumps": {"base": 8}, "counts": {"labelled": 3}}).model_dump(mode="json")
    assert {key: said[key] for key in ENDED.model_dump()} == ENDED.model_dump()
    assert (said["dumps"], said["counts"], said["label_hash"]) == ({"base": 8}, {"labelled": 3}, None)
    assert said["params"]["train"]["steps"] == 4
    assert config.Train.model_validate(said["params"]["train"]) == params.train
