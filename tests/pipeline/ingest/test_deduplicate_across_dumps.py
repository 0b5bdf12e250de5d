"""Near copies of val and test images never train, whichever of the two arrives first and whatever is split how."""

from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from pipeline import paths
from pipeline.ingest import add_dump, dump_registry
from pipeline.storage import atomic, shards
from tests.support import tiny_settings, tiny_source
from tests.support.command_line import marginalia

COPIES = {"WEBP": {"quality": 90}, "JPEG": {"quality": 92}}


def near_copies(seeds: list[int]) -> dict[str, bytes]:
    """Other pixels, the same picture: each seed's picture packed lossily in two ways."""
    return {
        f"{seed}-{kind.lower()}.{kind.lower()}": tiny_source.encode(tiny_source.picture(seed), kind, **options)
        for seed in seeds
        for kind, options in COPIES.items()
    }


def deliver(root: Path, name: str, pictures: dict[str, bytes]) -> None:
    shards.write_tar(root.parent / f"{name}.tar", pictures.items())
    add_dump.add(root.parent / f"{name}.tar", root=root, params=tiny_settings.params())


def settings(root: Path, *arguments: Any, **sections: Any) -> None:
    """Another params.yaml over the same registry."""
    known = dump_registry.read_dumps(root / dump_registry.FILE)
    tiny_source.write_project(root, *arguments, **sections)
    dump_registry.write_dumps(known, root / dump_registry.FILE)


@pytest.mark.parametrize("cap", [1, 5])
def test_a_dump_of_near_copies_under_every_split(tmp_path: Path, cap: int) -> None:
    """Groups a to f, each with masks; whichever of them the seed makes val and test, no copy of theirs trains."""
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, dict.fromkeys("abcdef", 2))
    ingest = {"near_duplicate_cap": cap}
    tiny_source.write_project(root, source, ingest=ingest)
    assert tiny_source.run(root) == 0
    seeds = [1000 * (g + 1) + n for g in range(6) for n in range(2)]
    deliver(root, "copies", near_copies(seeds) | {"new.png": tiny_source.encode(tiny_source.picture(9))})
    tests = set()
    for seed in range(3):
        settings(root, source, ingest=ingest, split={"seed": seed})
        assert tiny_source.run(root, dumps=("base", "copies")) == 0
        rows = tiny_source.rows(root)
        assert [key for key in rows if key.startswith("copies/")] == ["copies/new"]
        tests |= {row.group for row in rows.values() if row.split == "test"}
    assert len(tests) > 1  # the seeds did move the test set


@pytest.mark.parametrize("cap", [1, 5])
def test_an_unlabelled_image_whose_near_copy_later_becomes_test(tmp_path: Path, cap: int) -> None:
    """The copy is in a dump, and trains; then the source gets the original with a mask and lists it for test."""
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 3, "b": 2})
    ingest, no_val = {"near_duplicate_cap": cap}, {"val": 0}
    tiny_source.write_project(root, source, ingest=ingest, split=no_val)
    assert tiny_source.run(root) == 0
    deliver(root, "early", near_copies([77]))
    assert tiny_source.run(root, dumps=("base", "early")) == 0
    before = [key for key, row in tiny_source.rows(root).items() if row.dump == "early"]
    assert len(before) == min(cap, 2)
    tiny_source.put(source, "images/t/77.png", tiny_source.encode(tiny_source.picture(77)))
    tiny_source.put(source, "masks/t/77.png", tiny_source.encode(tiny_source.mask(77)))
    (source / "test.txt").write_text("t/77\n")
    data = {"source": "folder", "path": str(source), "lists": {"test": "test.txt"}}
    settings(root, source, data, ingest=ingest, split=no_val)
    assert tiny_source.run(root, dumps=("base", "early")) == 0
    rows = tiny_source.rows(root)
    assert rows["base/t/77"].split == "test"
    assert not [key for key in rows if key.startswith("early/")]


def test_the_manifest_does_not_depend_on_when_dumps_were_indexed(tmp_path: Path) -> None:
    """Week by week, or all at once: the same bytes."""
    source, root = tmp_path / "source", tmp_path / "project"
    tiny_source.write_source(source, {"a": 3, "b": 2})
    tiny_source.write_project(root, source, ingest={"near_duplicate_cap": 2}, split={"val": 0})
    assert tiny_source.run(root) == 0
    for n in range(3):
        deliver(root, f"week{n}", near_copies([50, 51, 60 + n]))
        assert tiny_source.run(root, dumps=("base", *(f"week{i}" for i in range(n + 1)))) == 0
    weekly = atomic.sha256(root / paths.MANIFEST), atomic.sha256(root / paths.QUARANTINE)
    (root / paths.MANIFEST).unlink()
    with chdir(root):
        assert marginalia("stage", "index") == 0
    assert (atomic.sha256(root / paths.MANIFEST), atomic.sha256(root / paths.QUARANTINE)) == weekly
