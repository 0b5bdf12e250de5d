"""Back to a former champion: pointer, history, warm start, what is refused, and kills at every file operation."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from marginalia import cli
from pipeline.champions import gate, history, rollback, store
from pipeline.ingest import dump_registry
from pipeline.storage import atomic
from serving.model import champion
from serving.settings import Settings
from tests.support import tiny_settings
from tests.support.crash_points import killed_at
from tests.support.tiny_gate import counts, write_run
from training import warm_start as start

GATE = tiny_settings.gate(bootstrap=100)


def line_of_champions(root: Path) -> list[str]:
    """Three champions, each better than the one before."""
    ids = []
    for name, recall in (("one", 0.70), ("two", 0.78), ("three", 0.86)):
        ids.append(write_run(root, name, counts((recall, recall, recall))))
        assert gate.run(root, GATE).verdict == "promoted"
    return ids


def dumps_yaml(root: Path, warm_start: str | None) -> None:
    base = dump_registry.DumpEntry(archive="data/pulled/base.tar")
    dump_registry.write_dumps(
        dump_registry.DumpRegistry(warm_start=warm_start, dumps={"base": base}), root / "dumps.yaml"
    )


def ids_in_history(root: Path) -> list[tuple[str, str | None]]:
    lines = (root / "champions/history.jsonl").read_text().splitlines()
    return [(record["id"], record.get("rolled_back_from")) for record in map(json.loads, lines)]


def test_back_one_by_one_then_forward_by_name(tmp_path: Path) -> None:
    one, two, three = line_of_champions(tmp_path)
    promoted = atomic.read_json(tmp_path / "champions/champion.json")
    assert rollback.run(tmp_path) == (two, three, False)
    assert rollback.run(tmp_path) == (one, two, False)
    with pytest.raises(store.ChampionError, match=r"champion\.json: .* no champion before it"):
        rollback.run(tmp_path)
    assert rollback.run(tmp_path, three) == (three, one, False)
    assert ids_in_history(tmp_path)[3:] == [(two, three), (one, two), (three, one)]
    now = store.read_champion(tmp_path / "champions")
    assert now is not None
    assert {key: now.to_record()[key] for key in promoted} == promoted  # what it was made from is still said
    assert now.previous == two


def test_the_server_follows_and_the_next_training_starts_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, two, three = line_of_champions(tmp_path)
    dumps_yaml(tmp_path, three)
    done = CliRunner().invoke(cli.app, ["rollback"])
    assert done.exit_code == 0
    assert f"champion {two}, rolled back from {three}" in done.stdout
    assert champion.bundle_folder(Settings(champions=tmp_path / "champions/champion.json")) == (
        tmp_path / "champions" / two / "bundle"
    )
    assert start.champion() == Path("champions") / two / "student.safetensors"
    dumps_yaml(tmp_path, None)
    assert not rollback.run(tmp_path, three).warm_start
    assert start.champion() is None  # who trains from the encoder goes on doing so


def test_the_gate_leaves_what_was_rolled_back_from_alone_until_it_is_named(tmp_path: Path) -> None:
    _, two, three = line_of_champions(tmp_path)
    rollback.run(tmp_path)
    verdict = gate.run(tmp_path, GATE)  # bundle/ still holds number three, which is better
    assert (verdict.verdict, "was rolled back from" in verdict.reason) == ("kept", True)
    assert store.read_champion(tmp_path / "champions").id == two
    four = write_run(tmp_path, "four", counts((0.88, 0.88, 0.88)))
    assert gate.run(tmp_path, GATE).verdict == "promoted"
    assert store.read_champion(tmp_path / "champions").previous == two
    rollback.run(tmp_path, three)
    assert history.withdrawn(history.read_history(tmp_path / "champions")) == {four}


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("bundle/model.onnx", b"other"), ("bundle/model.onnx", None), ("student.safetensors", b"other"),
        ("student.safetensors", None), ("scores.json", b"{"), ("confusions.npz", b"PK"), ("bundle/SHA256SUMS", None),
    ],
)  # fmt: skip
def test_a_damaged_champion_is_refused_by_name_and_nothing_moves(tmp_path: Path, file: str, harm: bytes | None) -> None:
    _, two, three = line_of_champions(tmp_path)
    dumps_yaml(tmp_path, three)
    path = tmp_path / "champions" / two / file
    path.unlink() if harm is None else path.write_bytes(harm)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(store.ChampionError) as caught:
        rollback.run(tmp_path)
    assert Path(file).name in str(caught.value)
    assert two in str(caught.value)
    assert "name another champion" in str(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_no_champion_an_unknown_one_and_a_gone_folder(tmp_path: Path) -> None:
    with pytest.raises(store.ChampionError, match=r"champion\.json: no champion yet"):
        rollback.run(tmp_path)
    one, two, three = line_of_champions(tmp_path)
    with pytest.raises(store.ChampionError, match=rf"history\.jsonl: no champion 'x'; known: {one}, {two}, {three}"):
        rollback.run(tmp_path, "x")
    shutil.rmtree(tmp_path / "champions" / two)
    with pytest.raises(store.ChampionError, match=rf"{two}: is gone; restore"):
        rollback.run(tmp_path)
    assert rollback.run(tmp_path, one).id == one
    (tmp_path / "champions" / one / "bundle" / "bundle.json").unlink()
    assert rollback.run(tmp_path, three).id == three  # the one left may be in any state


def test_a_repair_is_no_move_of_the_pointer(tmp_path: Path) -> None:
    """Killed behind the pointer, so that its line is missing, it is not taken for a rollback that was begun."""
    one, two, three = line_of_champions(tmp_path)
    rollback.run(tmp_path)
    write_run(tmp_path, "two", counts((0.78, 0.78, 0.78)))
    shutil.rmtree(tmp_path / "champions" / two)
    assert "written again" in gate.run(tmp_path, GATE).reason
    assert history.withdrawn(history.read_history(tmp_path / "champions")) == {three}
    file = tmp_path / "champions/history.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert [bool(json.loads(line).get("repaired")) for line in lines] == [False] * 4 + [True]
    file.write_text("".join(lines[:-1]))
    assert rollback.run(tmp_path) == (one, two, False)
    assert rollback.run(tmp_path, two) == (two, one, False)
    now = atomic.read_json(tmp_path / "champions/champion.json")
    assert (now["rolled_back_from"], now.get("repaired"), now.get("repaired_at")) == (one, None, None)


def test_a_kill_at_any_point_leaves_a_champion_and_the_second_try_ends_at_the_same_one(tmp_path: Path) -> None:
    begin = tmp_path / "start"
    one, two, three = line_of_champions(begin)
    dumps_yaml(begin, three)
    points, seen = 0, set()
    while True:
        points += 1
        root = tmp_path / f"k{points}"
        shutil.copytree(begin, root)
        killed = killed_at(points, lambda root=root: rollback.run(root))
        record = store.read_champion(root / "champions")
        assert record is not None
        seen.add(record.id)
        assert store.check_bundle(root / record.bundle) == record.id
        again = rollback.run(root) if killed else None
        assert store.read_champion(root / "champions").id == two, points
        assert again is None or again[:2] == (two, three)
        assert dump_registry.read_dumps(root / "dumps.yaml").warm_start == two
        assert ids_in_history(root) == [(one, None), (two, None), (three, None), (two, three)]
        shutil.rmtree(root)
        if not killed:
            break
    assert points > 6
    assert seen == {two, three}
