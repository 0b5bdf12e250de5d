"""Splits by group: the lists win, nothing leaks, the hashes name what they should."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.ingest import split
from pipeline.storage import manifest
from tests.support import tiny_settings, tiny_source

NO_LISTS: dict[str, list[str] | None] = dict.fromkeys(("labelled", "unlabelled", "val", "test"))


def row(name: str, group: str, *, mask: bool = True, dump: str = "base") -> manifest.Row:
    place = ("m", 0, 1) if mask else (None, None, None)
    return manifest.Row(f"id-{dump}-{name}", name, "folder", dump, group, 4, 4, "s", 0, 1, *place, "0" * 16)


def parts(rows: list[manifest.Row], lists: dict = NO_LISTS, **params: float) -> dict[str, str]:
    out, _ = split.assign(rows, lists, tiny_settings.split(**params))
    return {f"{r.dump}/{r.name}": r.split for r in out}


GROUPED = st.lists(
    st.tuples(st.integers(0, 9), st.booleans(), st.sampled_from(["base", "base", "d"])), min_size=1, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(GROUPED, st.integers(0, 50), st.floats(0, 0.49), st.floats(0, 0.49), st.none() | st.integers(1, 8))
def test_without_lists_nothing_ever_leaks(
    items: list[tuple[int, bool, str]], seed: int, val: float, test: float, labelled: int | None
) -> None:
    rows = [row(f"{n}", f"g{g}", mask=m and d == "base", dump=d) for n, (g, m, d) in enumerate(items)]
    params = tiny_settings.split(seed=seed, val=val, test=test, labelled=labelled)
    out, unused = split.assign(rows, NO_LISTS, params)
    split.verify(out)  # groups, ids, masks
    assert [replace(r, split="") for r in out] == rows
    counts = Counter(r.split for r in out)
    assert labelled is None or counts["labelled"] <= labelled
    assert all(r.split in ("unlabelled", "unused") for r in out if r.dump != "base" or r.mask_shard is None)
    assert {f"{r.dump}/{r.name}" for r in out if r.split == "unused"} == set(unused)
    if any(r.mask_shard for r in rows):
        assert counts["labelled"] >= 1
    assert split.assign(rows[::-1], NO_LISTS, params)[0] == out[::-1]


def test_shares_are_met_approximately_by_whole_groups() -> None:
    rows = [row(f"{g}/{n}", f"{g}") for g in range(1000) for n in range(2)]
    for seed in range(3):
        counts = Counter(parts(rows, seed=seed, val=0.1, test=0.2).values())
        assert abs(counts["test"] - 400) < 2 * 5 * 12.7  # five standard deviations of a binomial draw of groups
        assert abs(counts["val"] - 200) < 2 * 5 * 9.5
    assert parts(rows, seed=3) == parts(rows, seed=3) != parts(rows, seed=4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=5, unique=True))
def test_a_new_group_moves_no_other_one(seed: int, new: list[str]) -> None:
    known = [row(f"{g}/{n}", f"site {g}") for g in range(60) for n in range(1 + g % 3)]
    before = parts(known, seed=seed, val=0.1, test=0.2)
    drawn = [split.draw(f"site {g}", seed) for g in range(60)]
    assume(min(drawn) < 0.2 <= max(drawn) and any(0.2 <= value < 0.3 for value in drawn) and max(drawn) > 0.3)
    after = parts([*known, *(row(f"new/{n}", f"new {g}") for n, g in enumerate(new))], seed=seed, val=0.1, test=0.2)
    assert {name: after[name] for name in before} == before


def test_few_groups_still_fill_every_part() -> None:
    for seed in range(40):
        counts = Counter(parts([row(n, n) for n in "abc"], seed=seed, val=0.1, test=0.2).values())
        assert all(counts[part] >= 1 for part in ("test", "val", "labelled"))
        assert sum(counts.values()) == 3
        assert Counter(parts([row("a", "a")], seed=seed).values()) == {"labelled": 1}
        assert Counter(parts([row(n, n) for n in "ab"], seed=seed).values()) == {"labelled": 1, "test": 1}
        assert "val" not in parts([row(n, n) for n in "abcdef"], seed=seed, val=0).values()


def test_lists_win_and_what_they_leave_open_is_filled() -> None:
    rows = [row(f"{g}{n}", g) for g in "abcdefgh" for n in range(2)] + [row("x", "z", mask=False)]
    found = parts(rows, NO_LISTS | {"test": ["a0", "a1", "b0"]}, val=0.2)
    assert {name for name, part in found.items() if part == "test"} == {"base/a0", "base/a1", "base/b0"}
    assert found["base/b1"] == "unused"  # same place as a test image
    assert found["base/x"] == "unlabelled"
    counts = Counter(found.values())
    assert counts["val"] in (2, 4, 6)  # whole groups of two
    assert counts["val"] + counts["labelled"] == 12


def test_a_full_set_of_lists_leaves_the_rest_unused() -> None:
    rows = [row(n, n) for n in "abcdef"]
    lists = {"labelled": ["a"], "unlabelled": ["b"], "val": ["c"], "test": ["d"]}
    found = parts(rows, lists)
    assert [found[f"base/{n}"] for n in "abcdef"] == ["labelled", "unlabelled", "val", "test", "unused", "unused"]
    found = parts(rows, lists | {"unlabelled": None})
    assert [found[f"base/{n}"] for n in "bef"] == ["unlabelled"] * 3


def test_later_dumps_are_training_material_unless_they_show_an_evaluation_place() -> None:
    rows = [row("a", "site1"), row("b", "site2"), *(row(n, g, mask=False, dump="d") for n, g in ["x1", "y3"])]
    rows[2], rows[3] = replace(rows[2], group="site1"), replace(rows[3], group="site3")
    out, unused = split.assign(rows, NO_LISTS | {"test": ["a"]}, tiny_settings.split(val=0))
    assert [r.split for r in out] == ["test", "labelled", "unused", "unlabelled"]
    assert unused == {"d/x": "its group 'site1' is in test"}


def test_a_name_of_the_lists_in_a_later_dump_is_another_image() -> None:
    rows = [row("a", "g"), row("a", "h", mask=False, dump="d")]
    assert parts(rows, NO_LISTS | {"labelled": ["a"]}) == {"base/a": "labelled", "d/a": "unlabelled"}


def test_sizes_and_hashes_of_a_whole_project(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    ids = tiny_source.write_source(source, {"a": 6, "b": 4, "c": 3, "d": 5}, masked={"a", "b", "c"})
    files = {"labelled": ids[:4], "val": ids[6:10], "test": ids[10:13]}
    for part, names in files.items():
        (source / f"{part}.txt").write_text("\n".join(names))
    lists = {part: f"{part}.txt" for part in files}
    tiny_source.write_project(root, source, {"lists": lists})
    assert tiny_source.run(root) == 0
    rows, summary = tiny_source.rows(root), tiny_source.summary(root)
    by_split = {part: {r.id for r in rows.values() if r.split == part} for part in manifest.SPLITS}
    assert not by_split["labelled"] & by_split["unlabelled"]
    assert summary["counts"] == {"labelled": 4, "unlabelled": 7, "val": 4, "test": 3, "unused": 0}
    assert {p: len(i) for p, i in by_split.items()} == summary["counts"]
    assert summary["hidden_labels"] == 2  # a/04 and a/05; the five of d have no mask, which is fine
    truth = np.zeros(3, np.int64)
    for n in range(4):
        for k in range(3):
            truth[k] += int((tiny_source.mask(1000 + n) == k).sum())
    assert [summary["pixels"]["labelled"][name] for name in tiny_source.CLASSES] == truth.tolist()
    assert summary["groups"] == {"labelled": ["a"], "unlabelled": ["a", "d"], "val": ["b"], "test": ["c"]}
    assert summary["missing"] == {"labelled": [], "val": [], "test": []}
    first = {key: summary[key] for key in ("split_hash", "test_hash", "label_hash", "data_hash")}
    seen = [row for row in rows.values() if row.split in ("labelled", "val")]
    assert first["label_hash"] == manifest.set_hash(f"{row.id} {row.mask_digest}" for row in seen)

    def hashes() -> dict[str, str]:
        assert tiny_source.run(root) == 0
        again = tiny_source.summary(root)
        return {key: again[key] for key in first}

    assert hashes() == first
    tiny_source.put(source, f"masks/{ids[10]}.png", tiny_source.encode(tiny_source.mask(7)))  # one test mask changes
    changed = hashes()
    assert changed["test_hash"] != first["test_hash"]
    assert all(changed[key] == first[key] for key in ("split_hash", "label_hash", "data_hash"))
    tiny_source.put(source, f"masks/{ids[6]}.png", tiny_source.encode(tiny_source.mask(9)))  # and one for validation
    relabelled = hashes()
    assert [key for key in first if relabelled[key] != changed[key]] == ["label_hash"]
    (source / "labelled.txt").write_text("\n".join(ids[:3]))
    moved = hashes()
    assert moved["split_hash"] != first["split_hash"]
    assert [moved[key] == changed[key] for key in ("test_hash", "data_hash")] == [True, True]


def test_listed_images_that_were_refused_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    ids = tiny_source.write_source(source, {"a": 3, "b": 2, "c": 2})
    (source / "test.txt").write_text("\n".join(ids[5:]))
    tiny_source.put(source, f"images/{ids[6]}.png", b"")
    tiny_source.write_project(root, source, {"lists": {"test": "test.txt"}})
    assert tiny_source.run(root) == 0
    problem = f"1 of 2 images listed for test are not in the manifest, the first is '{ids[6]}'"
    assert problem in capsys.readouterr().err
    assert tiny_source.summary(root)["counts"]["test"] == 1


def test_no_labelled_image_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 3}, masked=set())
    tiny_source.write_project(root, source)
    assert tiny_source.run(root) == 1
    assert "not one label can be used" in capsys.readouterr().err
    assert not (root / "data/split/manifest.parquet").exists()


@pytest.mark.parametrize(
    ("counts", "lists", "shares", "message"),
    [
        ({"labelled": 0, "val": 1, "test": 1}, {}, (0.1, 0.2), "no labelled image"),
        (
            {"labelled": 0, "val": 0, "test": 1},
            {"test": ["x"]},
            (0.1, 0.2),
            "1 are listed for test; a source's own val set",
        ),
        (
            {"labelled": 2, "val": 0, "test": 1},
            {},
            (0.1, 0.2),
            "no val image.*its group 'a' is in test.*data.lists.val",
        ),
        ({"labelled": 2, "val": 1, "test": 0}, {"test": ["x"]}, (0.1, 0), "no test image"),
    ],
)
def test_an_empty_part_stops_before_training(counts, lists, shares, message) -> None:
    unused = {"base/x": "its group 'a' is in test"}
    params = tiny_settings.split(seed=0, val=shares[0], test=shares[1], labelled=None)
    with pytest.raises(ValueError, match=message):
        split.demand_parts(counts, unused, lists, params)


def test_a_part_that_is_not_wanted_may_be_empty() -> None:
    params = tiny_settings.split(seed=0, val=0, test=0, labelled=None)
    split.demand_parts({"labelled": 1, "val": 0, "test": 0}, {}, {}, params)
