"""No door lets a held-out place into training: however a delivery is packed, and however its folders are nested."""

import shutil
import zipfile
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest

from pipeline.storage import manifest
from tests.support import tiny_source
from tests.support.command_line import marginalia

CAMERAS = ("cam0", "cam1", "cam2", "cam3")
NESTED = tuple(f"site/{camera}" for camera in CAMERAS)


def _project(home: Path, groups: tuple[str, ...]) -> Path:
    tiny_source.write_source(home / "source", dict.fromkeys(groups, 3))
    tiny_source.write_project(home / "project", home / "source")
    assert tiny_source.run(home / "project") == 0
    return home / "project"


@pytest.fixture(scope="module")
def flat_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _project(tmp_path_factory.mktemp("flat"), CAMERAS)


@pytest.fixture(scope="module")
def nested_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _project(tmp_path_factory.mktemp("nested"), NESTED)


def _held(root: Path) -> set[str]:
    held = {row.group for row in tiny_source.rows(root).values() if row.split in ("val", "test")}
    assert held
    return held


def _files(names: list[str]) -> dict[str, bytes]:
    """An image of each name, its mask, and what macOS adds."""
    files = {"__MACOSX/._9.png": b"mac"}
    for k, name in enumerate(names):
        files[name] = tiny_source.encode(tiny_source.picture(100 + k))
        mask = name.replace("images/", "masks/") if "images/" in name else name.replace(".png", "_mask.png")
        files[mask] = tiny_source.encode(tiny_source.mask(100 + k))
    return files


def _zip(files: dict[str, bytes], home: Path) -> str:
    with zipfile.ZipFile(home / "may.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(home / "may.zip")


def _zip_with_its_folder(files: dict[str, bytes], home: Path) -> str:
    return _zip({f"delivery of may/{name}": data for name, data in files.items()}, home)


def _folder(files: dict[str, bytes], home: Path) -> str:
    for name, data in files.items():
        tiny_source.put(home / "may", name, data)
    return str(home / "may")


def _tar(files: dict[str, bytes], home: Path) -> str:
    (home / "may.tar").write_bytes(tiny_source.tar(files))
    return str(home / "may.tar")


def _shards_by_pattern(files: dict[str, bytes], home: Path) -> str:
    for n in range(2):
        some = dict(list(files.items())[n::2])
        (home / f"may-{n}.tar").write_bytes(tiny_source.tar(some))
    return f"file://{home}/may-{{0..1}}.tar"


FORMS = (_zip, _zip_with_its_folder, _folder, _tar, _shards_by_pattern)
# How one delivery of the same four cameras may nest its folders: the name of camera k's image.
LAYOUTS = {
    "as the source": "images/cam{}/9.png",
    "flat folders": "cam{}/9.png",
    "zipped with its folder": "may/images/cam{}/9.png",
    "in folders of its own": "may/2026/cam{}/9.png",
    "with a folder for the night": "cam{}/night/9.png",
    "with a split": "may/train/images/cam{}/9.png",
    "in capitals": "may/CAM{}/9.png",
    "below the site": "site/cam{}/9.png",
    "images below each camera": "cam{}/images/9.png",
}


def _delivered(project: Path, home: Path, pack: Callable[[dict[str, bytes], Path], str], names: list[str]) -> Path:
    """A copy of the project with the delivery ingested."""
    root = home / "project"
    shutil.copytree(project, root)
    where = pack(_files(names), home)
    with chdir(root):
        assert marginalia("add-dump", where, "--name", "may") == 0
    assert tiny_source.run(root, dumps=("base", "may")) == 0
    return root


def _delivered_rows(root: Path) -> list[manifest.Row]:
    return [row for row in tiny_source.rows(root).values() if row.dump == "may"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [CAMERAS, NESTED])
def test_held_out_cameras_are_recognised_in_any_nesting(
    request: pytest.FixtureRequest, tmp_path: Path, groups: tuple[str, ...], layout: str
) -> None:
    project = request.getfixturevalue("flat_project" if groups == CAMERAS else "nested_project")
    held = _held(project)
    root = _delivered(project, tmp_path, _zip, [LAYOUTS[layout].format(k) for k in range(4)])

    rows = _delivered_rows(root)
    assert len(rows) == 4, "the masks are no images"
    assert {row.group for row in rows} == set(groups)
    assert {row.split for row in rows if row.group in held} == {"unused"}
    assert {row.split for row in rows if row.group not in held} == {"unlabelled"}


@pytest.mark.parametrize("pack", FORMS)
def test_held_out_cameras_are_recognised_in_any_packing(
    nested_project: Path, tmp_path: Path, pack: Callable[[dict[str, bytes], Path], str]
) -> None:
    root = _delivered(nested_project, tmp_path, pack, [f"cam{k}/9.png" for k in range(4)])

    assert {row.group: row.split for row in _delivered_rows(root)} == {
        group: "unused" if group in _held(nested_project) else "unlabelled" for group in NESTED
    }


def test_what_was_taken_for_a_group_is_reported(
    nested_project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _delivered(nested_project, tmp_path, _zip, ["cam0/9.png", "cam1/9.png"])

    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "group by the end of its folders 2, the first: cam0/9 is of site/cam0" in out  # add-dump
    assert "group by the end of its folders, the first: cam0/9 is of site/cam0 2" in out  # ingest


def test_a_folder_of_several_groups_is_held_back_while_one_of_them_is_held_out(tmp_path: Path) -> None:
    groups = tuple(f"{site}/{camera}" for site in ("north", "south") for camera in ("cam0", "cam1", "cam2"))
    project = _project(tmp_path / "ambiguous", groups)
    held = _held(project)
    root = _delivered(project, tmp_path, _zip, [f"cam{k}/9.png" for k in range(3)])

    for row in _delivered_rows(root):
        camera = row.name.partition("/")[0]
        unclear = {f"north/{camera}", f"south/{camera}"} & held
        assert row.split == ("unused" if unclear else "unlabelled"), row.name
    unused = tiny_source.summary(root)["unused"]
    assert any("folders could be those of" in reason for name, reason in unused.items() if name.startswith("may/"))


def test_a_delivery_of_one_held_out_place_keeps_its_folder(flat_project: Path, tmp_path: Path) -> None:
    held = next(row.group for row in tiny_source.rows(flat_project).values() if row.split == "test")
    root = _delivered(flat_project, tmp_path, _zip, [f"{held}/images/night/9.png"])

    assert [(row.group, row.split) for row in _delivered_rows(root)] == [(held, "unused")]
