"""What history tells of champions: data, changed settings, why; old lines and damaged ones."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from marginalia import cli
from pipeline.champions import gate, history, store
from pipeline.champions.champion import Champion
from pipeline.storage import atomic
from tests.support import tiny_settings
from tests.support.tiny_gate import counts, write_run

GATE = tiny_settings.gate(bootstrap=400)
GOOD, BETTER = (0.80, 0.80, 0.70), (0.86, 0.84, 0.74)


def trained(root: Path, *, dumps: dict[str, int], lr: float, warm_start: str | None = None) -> None:
    atomic.write_json(root / "models/student/train.json", {
        "params": {"train": {"lr": lr, "crop": [64, 64]}, "model": {"encoder": "x"}}, "dumps": dumps, "labelled": 12,
        "counts": {"labelled": 12, "test": 8}, "split_hash": "5" * 64, "data_hash": "d" * 64,
        "warm_start": f"champions/{warm_start}/student.safetensors" if warm_start else None,
    })  # fmt: skip


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two champions in the current folder: the second with one more dump and another learning rate."""
    monkeypatch.chdir(tmp_path)
    first = write_run(tmp_path, "one", counts(GOOD))
    trained(tmp_path, dumps={"base": 20}, lr=0.1)
    assert gate.run(tmp_path, GATE).verdict == "promoted"
    second = write_run(tmp_path, "two", counts(BETTER))
    trained(tmp_path, dumps={"base": 20, "spring": 7}, lr=0.2, warm_start=first)
    assert gate.run(tmp_path, GATE).verdict == "promoted"
    return first, second


def test_each_champion_says_what_it_was_made_from_and_what_changed(two: tuple[str, str]) -> None:
    said = history.summarize(Path("champions"))
    one, other = said.champions
    assert (said.current, one.id, other.id) == (two[1], *two)
    assert one.changed is None  # nothing before it
    assert other.changed == {"train.lr": [0.1, 0.2]}
    assert other.data.dumps == {"base": 20, "spring": 7}
    assert (other.labelled, other.test_hash, other.warm_start) == (12, "t1", two[0])
    assert other.data.split_hash == "5" * 64
    assert other.delta == pytest.approx(atomic.read_json(Path("reports/gate.json"))["delta"])
    assert other.params["model"] == {"encoder": "x"}


def test_the_table_and_the_json_of_the_command(two: tuple[str, str]) -> None:
    console = Console(width=240, record=True)
    console.print(history.table(history.summarize(Path("champions"))))
    text = console.export_text()
    for part in (*two, "base 20, spring 7", "12 labelled", "split 555555555555", "train.lr 0.1 -> 0.2", "delta mIoU +"):
        assert part in text
    done = CliRunner().invoke(cli.app, ["history", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == history.summarize(Path("champions")).to_record()


def test_a_repair_is_a_row_of_its_own_and_no_victory(two: tuple[str, str]) -> None:
    (Path("champions") / two[1] / "student.safetensors").unlink()
    gate.run(Path(), GATE, now=lambda: datetime(2031, 5, 6, tzinfo=UTC))
    console = Console(width=400, record=True)
    console.print(history.table(history.summarize(Path("champions"))))
    rows = [line for line in console.export_text().splitlines() if two[1] in line]
    assert ["delta mIoU +" in row for row in rows] == [True, False]
    assert ["no new champion: its files were written again, since" in row for row in rows] == [False, True]
    assert ["2031-05-06" in row for row in rows] == [False, True]


def test_lines_of_an_older_version_still_show(two: tuple[str, str]) -> None:
    file = Path("champions/history.jsonl")
    short = ("id", "bundle", "student", "previous", "promoted_at", "miou", "reason")
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    old = {key: first[key] for key in short}
    file.write_text(json.dumps(old) + "\n" + json.dumps(second, sort_keys=True) + "\n")
    said = history.summarize(Path("champions"))
    assert [record.changed for record in said.champions] == [None, None]
    console = Console(width=240, record=True)
    console.print(history.table(said))
    assert "first champion: mIoU" in console.export_text()


def test_a_line_that_a_kill_left_out_is_shown_from_the_pointer(two: tuple[str, str]) -> None:
    file = Path("champions/history.jsonl")
    file.write_text(file.read_text().splitlines()[0] + "\n")
    assert [record.id for record in history.read_history(Path("champions"))] == list(two)


@pytest.mark.parametrize("line", ["{", "[1]", '{"name": "x"}'])
def test_a_damaged_line_is_named(two: tuple[str, str], line: str) -> None:
    file = Path("champions/history.jsonl")
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(store.ChampionError, match=r"history\.jsonl: line 3"):
        history.read_history(Path("champions"))


def test_nothing_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert history.summarize(Path("champions")).to_record() == {"current": None, "champions": []}
    assert "no champion yet" in CliRunner().invoke(cli.app, ["history"]).stdout


def test_settings_are_compared_key_by_key() -> None:
    before = Champion(id="a", params={"train": {"lr": 1, "crop": [1, 2]}, "gone": 3})
    after = Champion(id="b", params={"train": {"lr": 1, "crop": [1, 3]}, "model": {"new": None, "two": 2}})
    changes = {"train.crop": [[1, 2], [1, 3]], "gone": [3, None], "model.two": [None, 2]}
    assert history.changed_settings(before, after) == changes
    assert history.changed_settings(before, before) == {}
    assert history.changed_settings(before, Champion(id="c")) is None


def test_a_record_of_another_version_is_written_again_as_it_was_read() -> None:
    """Keys that are missing stay missing and unknown ones stay, whole numbers stay whole: else a line would come twice."""
    record = {"id": "a", "bundle": "b", "miou": 50, "scores": {"miou_ci": [1, None], "f1": 3}, "data": {}, "later": [1]}
    assert Champion.model_validate(record).to_record() == record
    assert json.dumps(Champion.model_validate(record).to_record()["miou"]) == "50"
