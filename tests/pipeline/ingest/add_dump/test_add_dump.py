"""add-dump: any form of delivery, one canonical archive, a registry that is written last and under a lock."""

import bz2
import gzip
import io
import lzma
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
import zstandard
from rich.table import Table

from pipeline.ingest import add_dump, dump_layout, dump_registry
from pipeline.storage import archives, atomic, shards
from tests.support import tiny_settings, tiny_source
from tests.support.command_line import marginalia

PARAMS = tiny_settings.params()
FILES = {f"cam/{n:02d}.png": tiny_source.encode(tiny_source.picture(n)) for n in range(5)}
FILES |= {
    "cam/notes.txt": b"hello",
    ".DS_Store": b"x",
    "__MACOSX/cam/._00.png": b"x",
    "masks/00.png": FILES["cam/00.png"],
}
FILES |= {"odd-name": FILES["cam/01.png"][:-1] + b"\x82", "inner.zip": b"PK\x03\x04...."}
TAKEN = ["images/cam/00.png", "images/cam/01.png", "images/cam/02.png", "images/cam/03.png", "images/cam/04.png"]


def as_folder(path: Path) -> Path:
    for name, data in FILES.items():
        tiny_source.put(path, name, data)
    return path


def as_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in FILES.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size, info.mtime = len(data), 12345
            tar.addfile(info, io.BytesIO(data))
    return path


def as_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cam/", b"")
        for name, data in FILES.items():
            archive.writestr(name.replace("/", "\\") if name.startswith("cam/03") else name, data)
    return path


def packed(pack: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(pack(as_tar(path.with_name("plain")).read_bytes()))
        return path

    return make


FORMS: dict[str, Callable[[Path], Path]] = {
    "night": as_folder,
    "night.tar": as_tar,
    "night.zip": as_zip,
    "night.tar.gz": packed(gzip.compress),
    "night.tar.bz2": packed(bz2.compress),
    "night.txz": packed(lzma.compress),
    "night.tar.zst": packed(zstandard.compress),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny_source.write_project(tmp_path / "project", tmp_path)
    return tmp_path / "project"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_archive(tmp_path: Path, root: Path, form: str) -> None:
    delivery = FORMS[form](tmp_path / form)
    shares: list[float] = []
    added = add_dump.add(delivery, root=root, params=PARAMS, seen=shares.append)
    assert (added.name, added.images, added.same_as) == ("night", 6, None)
    archive = root / "data/dumps/night.tar"
    found = shards.members(archive)
    assert [m.name for m in found] == [*TAKEN, "images/odd-name"]
    source = {f"images/{name}": data for name, data in FILES.items()}
    assert all(shards.read(archive, m.offset, m.length) == source[m.name] for m in found)
    assert atomic.sha256(archive) == CANONICAL
    entry = dump_registry.read_dumps(root / "dumps.yaml").dumps["night"]
    assert (entry.archive, entry.sha256, entry.images) == ("data/dumps/night.tar", added.sha256, 6)
    assert sorted(p.name for p in (root / "data/dumps").iterdir()) == [".lock", "night.tar"]
    assert dict(added.skipped) == {
        "cam/notes.txt": "label or text beside the images, not read",
        ".DS_Store": "system file", "__MACOSX/cam/._00.png": "system file",
        "masks/00.png": "masks of a later dump are not read", "inner.zip": "archive inside the archive, not opened",
    }  # fmt: skip
    assert shares == sorted(shares)


def canonical() -> str:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in [*TAKEN, "images/odd-name"]:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(FILES[name.removeprefix("images/")]), 0o644
            tar.addfile(info, io.BytesIO(FILES[name.removeprefix("images/")]))
        end = tar.offset
    return atomic.sha256(out.getvalue()[:end] + bytes(1024))


CANONICAL = canonical()


def test_look_alike_names_are_all_kept(tmp_path: Path, root: Path) -> None:
    for name in ("images/a.jpg", "a.png", "a.webp"):
        tiny_source.put(tmp_path / "in", name, FILES["cam/00.png"])
    add_dump.add(tmp_path / "in", name="x", root=root, params=PARAMS)
    names = [m.name for m in shards.members(root / "data/dumps/x.tar")]
    assert len({name.rpartition(".")[0] for name in names}) == 3
    assert {name.rpartition(".")[2] for name in names} == {"jpg", "png", "webp"}


def test_names_are_made_safe_and_free(tmp_path: Path, root: Path) -> None:
    names = []
    for n, file in enumerate(["Été 2026 (1).tar", "base.tar", "sub/base.tar", "___.tar"]):
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        shards.write_tar(path, [("a.png", tiny_source.encode(tiny_source.picture(100 + n)))])
        names.append(add_dump.add(path, root=root, params=PARAMS).name)
    assert names == ["t-2026-1", "base-2", "base-3", "dump"]
    assert list(dump_registry.read_dumps(root / "dumps.yaml").dumps) == ["base", *names]
    for bad in ("../x", "A", "", "a.b", "x" * 65):
        with pytest.raises(dump_registry.RegistryError, match="dump name"):
            add_dump.add(path, name=bad, root=root, params=PARAMS)
    with pytest.raises(dump_registry.RegistryError, match="'base' is registered"):
        add_dump.add(as_tar(tmp_path / "n.tar"), name="base", root=root, params=PARAMS)


def test_the_champion_becomes_the_warm_start(tmp_path: Path, root: Path) -> None:
    atomic.write_json(root / "champions/champion.json", {"id": "0123abcd"})
    added = add_dump.add(as_zip(tmp_path / "n.zip"), root=root, params=PARAMS)
    assert added.warm_start == dump_registry.read_dumps(root / "dumps.yaml").warm_start == "0123abcd"


def test_simultaneous_deliveries_are_all_registered(tmp_path: Path, root: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.ingest import add_dump as dumps\n"
        "from tests.support import tiny_settings\n"
        "dumps.add(Path(sys.argv[1]), root=Path(sys.argv[2]), params=tiny_settings.params())"
    )
    running = []
    for n in range(4):
        path = tmp_path / f"d{n}.tar"
        shards.write_tar(path, [("a.png", tiny_source.encode(tiny_source.picture(n)))])
        running.append(subprocess.Popen([sys.executable, "-c", code, str(path), str(root)]))
    assert [process.wait() for process in running] == [0] * 4
    assert sorted(dump_registry.read_dumps(root / "dumps.yaml").dumps) == ["base", *(f"d{n}" for n in range(4))]


def test_a_work_folder_that_ends_while_it_is_looked_at_disturbs_nobody(tmp_path: Path, root: Path) -> None:
    home = root / "data/dumps"
    home.mkdir(parents=True, exist_ok=True)
    (home / ".adding-ended").symlink_to(tmp_path / "ended")  # listed, yet gone when asked for its age
    assert add_dump.add(as_zip(tmp_path / "n.zip"), root=root, params=PARAMS).name == "n"


@pytest.mark.parametrize("name", ["", "a.txt", "a.seg.png", "masks/a.png"])
def test_a_delivery_without_images_is_refused(tmp_path: Path, root: Path, name: str) -> None:
    content = {name: b"no" if name.endswith("txt") else FILES["cam/00.png"]} if name else {}
    shards.write_tar(tmp_path / "n.tar", content.items())
    before = (root / "dumps.yaml").read_bytes()
    with pytest.raises(archives.DumpRefused, match=r"n\.tar: no image in it"):
        add_dump.add(tmp_path / "n.tar", root=root, params=PARAMS)
    assert (root / "dumps.yaml").read_bytes() == before


def test_oversized_files_are_left_out_and_named(tmp_path: Path, root: Path) -> None:
    small = tiny_settings.params(ingest={"max_file_mb": 1})
    shards.write_tar(tmp_path / "n.tar", [("a.png", FILES["cam/00.png"]), ("big.png", bytes((1 << 20) + 1))])
    added = add_dump.add(tmp_path / "n.tar", root=root, params=small)
    assert added.images == 1
    assert added.skipped == [("big.png", "larger than ingest.max_file_mb")]


def test_main_says_what_happened_and_what_is_next(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    delivery = as_zip(tmp_path / "night.zip")
    with chdir(root):
        assert marginalia("add-dump", str(delivery)) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "images taken │ 6" in out
        assert "dvc repro" in out
        assert marginalia("add-dump", str(delivery), "--name", "other") == 0
        assert "same files as dump 'night'" in " ".join(capsys.readouterr().out.split())
        assert marginalia("add-dump", str(tmp_path / "gone.zip")) == 1
        assert "gone.zip: no such file" in capsys.readouterr().err
        Path("dumps.yaml").write_text("dumps: {base: {archive: a, colour: red}}")
        assert marginalia("add-dump", str(delivery)) == 1
        assert "dumps.yaml: dumps.base.colour" in capsys.readouterr().err


def deliver(path: Path, seed: int) -> Path:
    shards.write_tar(path, [("a.png", tiny_source.encode(tiny_source.picture(seed)))])
    return path


def test_an_archive_that_the_registry_does_not_know_is_never_overwritten(tmp_path: Path, root: Path) -> None:
    before = (root / "dumps.yaml").read_bytes()
    add_dump.add(deliver(tmp_path / "night.tar", 1), root=root, params=PARAMS)
    (root / "data/dumps/torn.tar").write_bytes(b"no archive")
    (root / "dumps.yaml").write_bytes(before)  # the registry went back, as by a version control checkout
    kept = (root / "data/dumps/night.tar").read_bytes()
    other = deliver(tmp_path / "sub.tar", 2).rename(tmp_path / "night.tar")
    for taken in ("night", "torn"):
        with pytest.raises(dump_registry.RegistryError, match=rf"data/dumps/{taken}\.tar is there already"):
            add_dump.add(other, name=taken, root=root, params=PARAMS)
    assert (root / "dumps.yaml").read_bytes() == before
    assert add_dump.add(other, root=root, params=PARAMS).name == "night-2"
    assert (root / "data/dumps/night.tar").read_bytes() == kept
    again = add_dump.add(
        deliver(tmp_path / "night.tar", 1), root=root, params=PARAMS
    )  # the same files may take it over
    assert (again.name, again.same_as) == ("night", None)


def test_a_missing_archive_is_put_back_by_the_same_delivery(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    delivery = as_zip(tmp_path / "night.zip")
    add_dump.add(delivery, root=root, params=PARAMS)
    registered = (root / "dumps.yaml").read_bytes()
    (root / "data/dumps/night.tar").unlink()
    with chdir(root):
        assert marginalia("add-dump", str(delivery), "--name", "other") == 0
    assert "put back: data/dumps/night.tar was missing" in " ".join(capsys.readouterr().out.split())
    assert atomic.sha256(root / "data/dumps/night.tar") == CANONICAL
    assert (root / "dumps.yaml").read_bytes() == registered
    assert not add_dump.add(delivery, root=root, params=PARAMS).restored


def test_equal_names_are_numbered_without_starting_over() -> None:
    class Counted(dict[str, int]):
        looked = 0

        def __contains__(self, key: object) -> bool:
            self.looked += 1
            return super().__contains__(key)

    taken = Counted()
    names = [dump_layout._canonical(name, taken) for name in ("a~2.png", *["a.png"] * 2000, "a~2.jpg")]
    assert names[:4] == ["images/a~2.png", "images/a.png", "images/a~3.png", "images/a~4.png"]
    assert names[-1] == "images/a~2~2.jpg"
    assert len(set(names)) == len(names)
    assert taken.looked <= 2 * len(names)


def test_what_was_passed_over_is_shown_with_its_first_name() -> None:
    skipped = [("may/notes.txt", "text"), ("may/more.txt", "text")]
    added = add_dump.Added("may", 1, "0" * 64, Path("data/dumps/may.tar"), skipped, None, None)
    table = add_dump._shown(added, "may.zip")[0]
    assert isinstance(table, Table)
    assert list(table.columns[1].cells) == ["1", "2, the first: may/notes.txt"]
