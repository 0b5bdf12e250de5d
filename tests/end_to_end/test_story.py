"""The whole story by the commands a user types: files to a gated bundle, nothing to do, a new dump, a mistyped setting."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from export.bundle import bundle
from export.runtime.runtime import Runtime
from tests.support import tiny_settings
from tests.support.tiny_project import CLASSES, scene
from tests.support.tiny_source import encode, put

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
]  # a whole pipeline in a fixture: minutes where two cores are shared

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "model": {"architecture": "FPN", "encoder": "resnet10t", "weights": None},
    "input": {"long_side": 96, "stride": 32},
    "train": {"method": "s4mc", "steps": 24, "batch_labelled": 4, "batch_unlabelled": 4, "crop": [64, 96], "scale": [0.8, 1.2],
              "warmup_steps": 10, "ramp_steps": 4, "val_every": 12,
              "optimizer": {"lr": 0.003, "lr_encoder": 0.003}, "ema": 0.8},
    "evaluate": {"bootstrap": 100, "previews": 2},
    "parity": {"agreement": 0.999, "class_agreement": 0.98},
    "gate": {"bootstrap": 200},
    "pool": {"permutations": 199, "label_next": 4},
}  # fmt: skip


def write_images(folder: Path, groups: dict[str, int], masked: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for group, count in groups.items():
        for n in range(count):
            image, truth = scene(rng, 64, 96)
            put(folder, f"images/{group}/{n:02d}.png", encode(image))
            if masked:
                put(folder, f"masks/{group}/{n:02d}.png", encode(truth))


class Project:
    """A copy of the repository's code in a folder of its own, under git, with small settings and a user's own images."""

    def __init__(self, root: Path) -> None:
        self.root = root / "project"
        for room in ("marginalia", "pipeline", "training", "export", "serving"):
            shutil.copytree(ROOT / room, self.root / room, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("dvc.yaml", "dumps.yaml", "labels.yaml", ".gitignore", ".dvcignore"):
            shutil.copy(ROOT / name, self.root / name)
        put(self.root, "data/labels/.gitkeep", b"")
        shutil.copytree(
            ROOT / ".dvc", self.root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local")
        )
        self.source = root / "source"
        write_images(self.source, {"a": 6, "b": 6, "v": 6, "t": 8}, masked=True, seed=1)
        write_images(self.source, {"u": 14}, masked=False, seed=2)
        put(self.source, "classes.txt", "".join(f"{c['name']}\n" for c in CLASSES).encode())
        names = {part: "".join(f"{g}/{n:02d}\n" for g, k in groups for n in range(k)) for part, groups in {
            "labelled": [("a", 6), ("b", 6)], "val": [("v", 6)], "test": [("t", 8)]}.items()}  # fmt: skip
        for part, text in names.items():
            put(self.source, f"{part}.txt", text.encode())
        self.change(
            data={"source": "folder", "path": str(self.source), "lists": {part: f"{part}.txt" for part in names}}
        )
        tools = Path(sys.executable).parent
        self.environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1",
            **{f"GIT_{who}_{what}": "m@example" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        }  # fmt: skip
        self.run("git", "init", "-q")
        self.commit()

    def change(self, **sections: object) -> None:
        path = self.root / "params.yaml"
        now = yaml.safe_load(path.read_text()) if path.exists() else tiny_settings.raw(**SETTINGS)
        path.write_text(yaml.safe_dump(tiny_settings.plain({**now, **sections})))

    def commit(self) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", "now")

    def run(self, *command: str, fails: bool = False) -> str:
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=900)
        assert (done.returncode != 0) == fails, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    def json(self, name: str) -> dict:
        return json.loads((self.root / name).read_text())

    def ran(self, output: str) -> set[str]:
        return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("story"))


@pytest.fixture(scope="module")
def first(project: Project) -> str:
    return project.run("dvc", "repro")


def test_one_command_leads_from_a_folder_to_a_gated_bundle(project: Project, first: str) -> None:
    names = [
        "pull",
        "ingest@base",
        "index",
        "split",
        "screen",
        "train",
        "train_report",
        "evaluate",
        "export",
        "parity",
        "gate",
    ]
    assert project.ran(first) == {*names, "predict", "drift", "rank", "suspects", "data_report"}
    champion = project.json("champions/champion.json")
    manifest = bundle.verify(project.root / champion["bundle"])
    assert manifest.id == champion["id"]
    assert [c.name for c in manifest.classes] == [c["name"] for c in CLASSES]
    scores, parity, gate = (project.json(f"reports/{n}.json") for n in ("scores", "parity", "gate"))
    assert scores["test_images"] == 8
    assert 0 < scores["miou"] <= 100
    assert scores["miou_ci"][0] <= scores["miou"] <= scores["miou_ci"][1]
    assert parity["passed"] is True
    assert gate["verdict"] == "promoted"
    for picture in ("reports/train/curves.png", "reports/train/pseudo_labels.png", "reports/evaluate/confusion.png"):
        assert (project.root / picture).stat().st_size > 5_000
    kept = (project.root / "reports/train/live/plots/metrics/kept.tsv").read_text().splitlines()
    assert kept[0].split("\t") == ["step", "kept"]
    assert len(kept) >= 2
    split = project.json("data/split/summary.json")
    assert split["counts"] == {"labelled": 12, "unlabelled": 14, "val": 6, "test": 8, "unused": 0}


def test_the_champion_answers_as_the_scores_say(project: Project, first: str) -> None:
    """The bundle alone, on the test images as files: its mIoU is the reported one."""
    from pipeline.champions import metrics as scores
    from pipeline.imaging import decode, label_maps
    from training import metrics

    opened = bundle.open_bundle(project.root / project.json("champions/champion.json")["bundle"])
    bars, reported = tiny_settings.params(**SETTINGS).parity, project.json("reports/scores.json")["miou"]
    assert str(opened.manifest.options[0]) == "onnxruntime cpu fp32"
    for option in opened.manifest.options:  # what parity admitted here runs here
        runtime = Runtime(opened, provider=option.provider, precision=option.precision)
        total = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
        for n in range(8):
            image = decode.decode((project.source / f"images/t/{n:02d}.png").read_bytes(), max_pixels=10**6)
            truth = label_maps.decode_mask((project.source / f"masks/t/{n:02d}.png").read_bytes(), max_pixels=10**6)
            total += metrics.confusion(truth, runtime.segment(image).label_HW, len(CLASSES), 255)
        assert scores.miou(total) >= reported - bars.limits(option.precision).miou_drop - 1e-6, option


def test_nothing_changed_means_nothing_runs(project: Project, first: str) -> None:
    assert project.ran(project.run("dvc", "repro")) == set()
    report = project.run("marginalia", "report")
    for word in ("mIoU", *(c["name"] for c in CLASSES), "parity", "promoted", "make serve"):
        assert word in report


def test_what_is_suggested_for_labelling_is_a_folder_we_can_read_back(project: Project, first: str) -> None:
    folder = project.root / "reports/label_next"
    images = sorted(p.relative_to(folder / "images").with_suffix("") for p in (folder / "images").rglob("*.png"))
    masks = sorted(p.relative_to(folder / "masks").with_suffix("") for p in (folder / "masks").rglob("*.png"))
    assert len(images) == 4
    assert images == masks
    assert (folder / "classes.txt").read_text().split() == [c["name"] for c in CLASSES]


def test_a_mistyped_setting_stops_before_any_work(project: Project, first: str) -> None:
    good = (project.root / "params.yaml").read_text()
    project.change(train={**SETTINGS["train"], "methd": "s4mc"})
    output = project.run("dvc", "repro", "train", fails=True)
    (project.root / "params.yaml").write_text(good)
    assert "train.methd" in output
    assert "did you mean 'method'?" in output


def test_a_new_dump_is_ingested_alone_and_the_next_training_starts_from_the_champion(
    project: Project, first: str
) -> None:
    champion = project.json("champions/champion.json")["id"]
    shard = project.root / "data/ingested/base/images-00000.tar"
    before = (shard.stat().st_mtime_ns, shard.stat().st_ino)
    dump = project.root.parent / "monday"
    write_images(dump, {"m": 7}, masked=False, seed=3)
    assert "7" in project.run("marginalia", "add-dump", str(dump))
    again = project.run("marginalia", "add-dump", str(dump))  # delivered twice
    assert "nothing new" in again
    assert (project.root / "data/dumps/monday.tar.dvc").exists()
    assert (project.root / f"champions/{champion}.dvc").exists()
    output = project.run("dvc", "repro")
    assert {s for s in project.ran(output) if s.startswith("ingest")} == {"ingest@monday"}
    assert "pull" not in project.ran(output)
    assert (shard.stat().st_mtime_ns, shard.stat().st_ino) == before
    assert champion in project.json("models/student/train.json")["warm_start"]
    assert project.json("data/split/summary.json")["counts"]["unlabelled"] == 21
    gate = project.json("reports/gate.json")
    assert gate["verdict"] in ("promoted", "kept")
    pointer = project.json("champions/champion.json")["id"]
    assert (pointer == champion) == (gate["verdict"] == "kept")
    told = json.loads(project.run("marginalia", "history", "--json"))["champions"][0]
    assert (told["id"], told["data"]["dumps"], told["labelled"]) == (champion, {"base": 40}, 12)
    assert told["params"]["train"]["steps"] == SETTINGS["train"]["steps"]
    assert "monday" in project.json("reports/drift.json")["dumps"]
    assert project.ran(project.run("dvc", "repro")) == set()


def test_methods_are_compared_as_experiments_without_touching_the_workspace(project: Project, first: str) -> None:
    project.commit()
    compare = ("marginalia", "compare", "--methods", "supervised", "--seeds", "0", "-S", "train.steps=4")
    assert "supervised" in project.run(*compare)
    (name,) = project.run("dvc", "exp", "list", "--name-only").split()
    assert name.startswith("compare-supervised-seed0-")
    (row,) = csv.DictReader((project.root / "reports/compare/table.csv").read_text().splitlines())
    (run,) = csv.DictReader((project.root / "reports/compare/runs.csv").read_text().splitlines())
    assert (row["method"], row["seeds"], row["kept"], row["gain"]) == ("supervised", "1", "nan", "0.0")
    assert float(row["miou"]) == float(run["miou"]) > 0
    assert float(run["seconds_per_step"]) > 0
    assert (project.root / "reports/compare/compare.png").stat().st_size > 5_000
    diff = json.loads(project.run("dvc", "metrics", "diff", "--json", "HEAD", name))
    assert diff["reports/scores.json"]["miou"]["new"] == pytest.approx(float(row["miou"]))
    assert project.json("reports/scores.json")["method"] == "s4mc"
    project.run(*compare)  # nothing is trained twice
    assert project.run("dvc", "exp", "list", "--name-only").split() == [name]
    assert (project.root / "params.yaml").read_text().count("method: s4mc") == 1


def test_corrected_labels_run_index_and_split_and_nothing_upstream(project: Project, first: str) -> None:
    """A few images of label_next come back from Label Studio as they were sent, submitted."""
    before = project.json("data/split/summary.json")["counts"]
    tasks = project.json("reports/label_next/labelstudio.json")[:2]
    for task in tasks:
        task["annotations"] = [{"result": found["result"]} for found in task.pop("predictions")]
    (project.root.parent / "back.json").write_text(json.dumps(tasks))
    for words in ("next: `dvc repro`", "nothing new"):
        assert words in project.run("marginalia", "import-labels", str(project.root.parent / "back.json"))
    assert (project.root / "data/labels/back.tar.dvc").exists()
    assert project.ran(project.run("dvc", "repro", "split")) == {"index", "split"}
    after = project.json("data/split/summary.json")["counts"]
    assert after == before | {"labelled": before["labelled"] + 2, "unlabelled": before["unlabelled"] - 2}
    assert project.ran(project.run("dvc", "repro", "split")) == set()
    status = project.run("git", "status", "--porcelain", "data/labels", "labels.yaml")
    assert sorted(line[3:] for line in status.splitlines()) == ["data/labels/back.tar.dvc", "labels.yaml"]
    rows = project.run("marginalia", "export-labels", "--format", "voc", "-o", "out", "--split", "labelled")
    assert f"{after['labelled']} images for voc" in rows
