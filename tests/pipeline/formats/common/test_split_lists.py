"""Split lists as they were published: UniMatch's pairs, U2PL's ids and paths, plain and gzipped."""

import gzip
from contextlib import chdir
from pathlib import Path

import pytest

from pipeline.formats.common import split_lists
from pipeline.formats.common.source import SourceError
from tests.support import tiny_settings

CITY = "train/aachen/aachen_000000_000019"
ALIASES = {f"leftImg8bit/{CITY}_leftImg8bit": CITY, "JPEGImages/2007_000033": "2007_000033"}
IDS = {CITY, "2007_000033", "a b", "x,y", "deep/a.b"}


def read(root: Path, text: str | bytes, name: str = "val.txt") -> list[str] | None:
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return split_lists.read(root, tiny_settings.lists(val=name), IDS, ALIASES)["val"]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("2007_000033", "2007_000033"),
        ("2007_000033.jpg", "2007_000033"),
        ("JPEGImages/2007_000033.jpg SegmentationClass/2007_000033.png", "2007_000033"),
        ("./JPEGImages/2007_000033.jpg", "2007_000033"),
        ("JPEGImages\\2007_000033.jpg", "2007_000033"),
        ("2007_000033,some,more", "2007_000033"),
        (CITY, CITY),
        (f"leftImg8bit/{CITY}_leftImg8bit.png", CITY),
        (f"leftImg8bit/{CITY}_leftImg8bit.png gtFine/{CITY}_gtFine_labelTrainIds.png", CITY),
        (f"leftImg8bit/{CITY}_leftImg8bit.png\tgtFine/{CITY}_gtFine_labelTrainIds.png", CITY),
        ("a b", "a b"),
        ("a b.png", "a b"),
        ("x,y", "x,y"),
        ("deep/a.b", "deep/a.b"),
        ("deep/a.b.jpg", "deep/a.b"),
    ],
)
def test_each_published_spelling_names_the_image(tmp_path: Path, line: str, key: str) -> None:
    assert read(tmp_path, f"\n{line}\r\n") == [key]


def test_gzip_is_told_by_content_and_order_is_kept(tmp_path: Path) -> None:
    assert read(tmp_path, gzip.compress(b"x,y\n2007_000033\n"), "val.txt") == ["x,y", "2007_000033"]
    assert read(tmp_path, gzip.compress("\ufeffa b\n".encode()), "val.txt.gz") == ["a b"]


def test_a_list_lies_in_the_source_or_the_project_or_anywhere(tmp_path: Path) -> None:
    source, project, other = tmp_path / "source", tmp_path / "project", tmp_path / "other"
    for folder, text in ((source, "a b"), (project, "x,y"), (other, CITY)):
        folder.mkdir()
        (folder / f"{folder.name}.txt").write_text(text)
    named = tiny_settings.lists(val="source.txt", test="project.txt", labelled=str(other / "other.txt"))
    with chdir(project):
        found = split_lists.read(source, named, IDS, ALIASES)
    assert found == {"val": ["a b"], "test": ["x,y"], "labelled": [CITY], "unlabelled": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b\nnope\nnor\n", "2 ids have no image here, the first is 'nope'"),
        ("a b\nx,y\na b.png\n", r"'a b' is listed twice \(1 repeats"),
        ("other/2007_000033\n", "1 ids"),  # the folder is part of the name
        (gzip.compress(b"a b\n" * 50)[:-9], "damaged gzip"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_a_wrong_list_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(SourceError, match=rf"val\.txt.*{message}"):
        read(tmp_path, text)


def test_a_gzip_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_lists, "MAX_BYTES", 1 << 20)
    with pytest.raises(SourceError, match="more than 1 MiB"):
        read(tmp_path, gzip.compress(b"a" * (3 << 20)))


def test_a_missing_list_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("a b")
    with pytest.raises(SourceError, match=r"vall\.txt: not found \(there is val\.txt\).*data\.lists\.test"):
        split_lists.read(tmp_path, tiny_settings.lists(test="vall.txt"), IDS)


def test_own_lists_keep_benchmark_images_out_of_training() -> None:
    parts = {"val": ["v1", "v2"], "test": ["t1", "t2"]}
    found, left_out, _ = split_lists.own(parts, {"v1", "v2", "t1", "a"})
    assert (found["val"], found["test"], left_out) == (["v1", "v2"], ["t1"], {"t2"})
    found, left_out, notes = split_lists.own(parts, {"v1", "a"})  # test labels are held back: val is what is reported
    assert (found["val"], found["test"], left_out) == (None, ["v1"], {"v2", "t1", "t2"})
    assert "2 test images without labels" in notes[1]
    assert split_lists.own({}, {"a"})[0] == dict.fromkeys(split_lists.LISTS)


def test_real_published_lists(shared_data: Path) -> None:
    """All of UniMatch's and U2PL's files, against a tree that holds exactly the images they name."""
    splits = shared_data.parent / "splits"
    if not splits.exists():
        pytest.skip(f"{splits} is absent")
    pascal = {line.strip() for line in (splits / "u2pl/pascal/val.txt").read_text().split()}
    pairs = gzip.decompress((splits / "unimatch/pascal/train_aug.txt.gz").read_bytes()).decode().split()
    pascal |= {image.removeprefix("JPEGImages/").removesuffix(".jpg") for image in pairs[::2]}
    assert len(pascal) == 10582 + 1449
    aliases = {f"JPEGImages/{key}": key for key in pascal}
    for name, counts in {"unimatch/pascal/92": (92, 10490), "u2pl/pascal/183": (183, 10399)}.items():
        named = tiny_settings.lists(
            labelled=str(splits / name / "labeled.txt"),
            unlabelled=str(splits / name / "unlabeled.txt.gz"),
            test=str(splits / name.partition("/")[0] / "pascal/val.txt"),
        )
        found = split_lists.read(Path("nowhere"), named, pascal, aliases)
        assert (len(found["labelled"] or ()), len(found["unlabelled"] or ())) == counts
        assert len(found["test"] or ()) == 1449
