"""Forms of a delivery beside one folder or archive: WebDataset shards, and URLs read through fsspec."""

import gzip
import importlib.util
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest
import zstandard

from pipeline.ingest import add_dump, dump_registry, remote, webdataset
from pipeline.storage import archives, shards
from tests.support import tiny_settings, tiny_source
from tests.support.tiny_source import tar

GOLDEN = Path(__file__).parents[2] / "golden/webdataset"
PICTURES = {f"{n:06d}.png": tiny_source.encode(tiny_source.picture(n)) for n in range(8)}
LIMITS = archives.ArchiveLimits(1 << 30, 1 << 20, 100, 200)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny_source.write_project(tmp_path / "project", tmp_path)
    return tmp_path / "project"


def add(root: Path, where: str | Path, **ingest: float) -> add_dump.Added:
    return add_dump.add(where, root=root, params=tiny_settings.params(ingest=ingest))


def refused(root: Path, where: str | Path, **ingest: float) -> str:
    before = (root / "dumps.yaml").read_bytes()
    with pytest.raises(archives.DumpRefused) as error:
        add(root, where, **ingest)
    assert (root / "dumps.yaml").read_bytes() == before
    assert not [p.name for p in (root / "data/dumps").iterdir() if p.name != ".lock"]
    return str(error.value)


def write_shards(folder: Path, count: int = 4, pack: Callable[[bytes], bytes] = bytes, suffix: str = ".tar") -> Path:
    """Two pictures a shard, the same two keys in each."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        pair = [PICTURES[f"{2 * n + i:06d}.png"] for i in range(2)]
        body = {"a.png": pair[0], "a.cls": b"3", "a.json": b"{}", "b.png": pair[1], "b.txt": b"a cat"}
        (folder / f"shard-{n:06d}{suffix}").write_bytes(pack(tar(body)))
    return folder


def taken(root: Path, name: str) -> dict[str, bytes]:
    archive = root / f"data/dumps/{name}.tar"
    return {m.name: shards.read(archive, m.offset, m.length) for m in shards.members(archive)}


def test_a_webdataset_of_its_own_library(root: Path) -> None:
    """Keys repeat in the second shard; labels and the masks KEY.seg.png are left out by name."""
    added = add(root, f"{GOLDEN}/shard-{{000000..000001}}.tar")
    assert (added.name, added.images) == ("shard-000000-000001", 4)
    names = ["images/000000.jpg", "images/000000~2.jpg", "images/000001.png", "images/000001~2.png"]
    assert list(taken(root, added.name)) == names
    assert sorted(name for name, _ in added.skipped) == sorted(
        [*[f"{n:06d}.{kind}" for n in range(2) for kind in ("cls", "json")] * 2, "000000.seg.png", "000001.seg.png"]
    )
    assert {reason for _, reason in added.skipped} == {"label or text beside the images, not read"}
    assert add(root, GOLDEN).same_as == added.name  # the same shards, named by their folder


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, ".tar.gz"), (zstandard.compress, ".tar.zst")])
def test_shards_may_be_packed(tmp_path: Path, root: Path, pack: Callable[[bytes], bytes], suffix: str) -> None:
    folder = write_shards(tmp_path / "week", pack=pack, suffix=suffix)
    (folder / "README.md").write_text("about")
    added = add(root, folder)
    assert (added.name, added.images) == ("week", 8)
    assert sorted(taken(root, "week").values()) == sorted(PICTURES.values())


def test_a_missing_or_damaged_shard_refuses_all(tmp_path: Path, root: Path) -> None:
    folder = write_shards(tmp_path / "week")
    pattern = f"{folder}/shard-{{000000..000003}}.tar"
    last = folder / "shard-000003.tar"
    whole = last.read_bytes()
    last.write_bytes(whole[:2000])
    assert "shard-000003.tar" in refused(root, pattern)
    assert "shard-000003.tar" in refused(root, folder)
    last.unlink()
    assert "1 of 4 shards are missing, the first is shard-000003.tar" in refused(root, pattern)
    last.write_bytes(whole)
    (folder / "shard-000001.tar").unlink()
    assert "shard-000001.tar is missing among its neighbours" in refused(root, folder)
    assert add(root, f"{folder}/shard-{{000000,000002,000003}}.tar").images == 6  # as the user means it


def test_caps_count_over_all_shards(tmp_path: Path, root: Path) -> None:
    folder = write_shards(tmp_path / "week")
    assert "more than 19 files" in refused(root, folder, dump_max_files=19)
    size = sum(len(data) for data in PICTURES.values()) / 2**30
    assert "ingest.dump_max_gb" in refused(root, folder, dump_max_gb=0.9 * size)


def test_dates_are_no_shard_numbers_and_images_beside_tars_make_a_folder(tmp_path: Path, root: Path) -> None:
    for n, day in enumerate((20260105, 20260112, 20260119)):
        tiny_source.put(tmp_path / "weeks", f"cam-{day}.tar", tar({"a.png": PICTURES[f"{n:06d}.png"]}))
    assert add(root, tmp_path / "weeks").images == 3
    tiny_source.put(tmp_path / "weeks", "cam.png", PICTURES["000007.png"])
    again = add(root, tmp_path / "weeks")
    assert (again.images, {reason for _, reason in again.skipped}) == (1, {"archive inside the archive, not opened"})


@pytest.mark.parametrize("name", ["IMG_0001", "b/x.zip", "a.raw", "readme_01", "LICENSE-PLATE"])
def test_what_may_hold_images_beside_tars_refuses_the_delivery(
    tmp_path: Path, root: Path, store: fsspec.AbstractFileSystem, name: str
) -> None:
    """Read as shards, the folder would lose it without a word."""
    folder = write_shards(tmp_path / "week")
    for place in (name, "zz"):
        tiny_source.put(folder, place, PICTURES["000007.png"])
        store.pipe(f"/bucket/week/{place}", PICTURES["000007.png"])
    for path in folder.glob("*.tar"):
        store.pipe(f"/bucket/week/{path.name}", path.read_bytes())
    for where in (folder, "memory://bucket/week"):
        assert f"{where}: {name!a} lies beside tars" in refused(root, where)
    for path in folder.glob("*.tar"):
        path.unlink()
    assert add(root, folder).images == 2  # without tars all is looked at


def test_papers_labels_and_system_files_may_lie_beside_shards(tmp_path: Path, root: Path) -> None:
    folder = write_shards(tmp_path / "week")
    for name in (
        "README", "licence.rst", "SHA256SUMS", "md5sum.txt", "checksums", "shard-000000.tar.sha256", "shard-000000.tar.md5",
        "shard-000000.idx", "shard-000000.json", "classes.txt", "index.html", "_SUCCESS", ".DS_Store", ".git/HEAD",
        "__MACOSX/x", "Thumbs.db", "masks/a", "sub/NOTICE", "00000.parquet", "00000_stats.json", "loader.py",
    ):  # fmt: skip
        tiny_source.put(folder, name, b"text")
    assert add(root, folder).images == 8


def test_braces_are_a_shells() -> None:
    assert webdataset.braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert webdataset.braces("{x,y}/s{0..1}") == ["x/s0", "x/s1", "y/s0", "y/s1"]
    assert webdataset.braces("plain {name}.tar") == ["plain {name}.tar"]
    for bad, why in (("a{5..1}", "backwards"), ("a{0..99999999999}", "more than"), ("{0..999}{0..999}", "more than")):
        with pytest.raises(archives.DumpRefused, match=why):
            webdataset.braces(bad)


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def test_a_file_behind_a_url(root: Path, store: fsspec.AbstractFileSystem) -> None:
    store.pipe("/bucket/night one.tar", tar(PICTURES))
    added = add(root, "memory://bucket/night one.tar")
    assert (added.name, added.images) == ("night-one", 8)
    assert sorted(taken(root, added.name).values()) == sorted(PICTURES.values())
    assert sorted(p.name for p in (root / "data/dumps").iterdir()) == [".lock", "night-one.tar"]


def test_a_folder_and_shards_behind_a_url(root: Path, store: fsspec.AbstractFileSystem) -> None:
    for name, data in PICTURES.items():
        store.pipe(f"/bucket/week/cam/{name}", data)
    store.pipe("/bucket/week/cam/000000.json", b"{}")
    added = add(root, "memory://bucket/week/")
    assert (added.name, added.images, len(added.skipped)) == ("week", 8, 1)
    assert list(taken(root, "week")) == [f"images/cam/{name}" for name in PICTURES]
    for n in range(4):
        store.pipe(f"/bucket/s/shard-{n:06d}.tar", tar({f"x{i}.png": PICTURES[f"{2 * n + i:06d}.png"] for i in (0, 1)}))
    for where in ("memory://bucket/s", "memory://bucket/s/shard-{000000..000003}.tar"):
        assert add(root, where).same_as == "week"


def test_caps_hold_while_a_url_is_read(root: Path, store: fsspec.AbstractFileSystem) -> None:
    store.pipe("/b/big.tar", bytes(6 << 20))
    assert "memory://b/big.tar: unpacks to more than" in refused(root, "memory://b/big.tar", dump_max_gb=0.005)
    for n in range(9):
        store.pipe(f"/b/many/{n}.png", PICTURES["000000.png"])
    assert "more than 8 files" in refused(root, "memory://b/many", dump_max_files=8)
    store.pipe("/b/mixed/a.png", PICTURES["000000.png"])
    store.pipe("/b/mixed/b.png", bytes((1 << 20) + 1))
    assert add(root, "memory://b/mixed", max_file_mb=1).skipped == [("b.png", "larger than ingest.max_file_mb")]


def test_damaged_hostile_and_absent_things_behind_a_url(root: Path, store: fsspec.AbstractFileSystem) -> None:
    store.pipe("/b/cut.tar", tar(PICTURES)[:5000])
    assert "memory://b/cut.tar" in (said := refused(root, "memory://b/cut.tar"))
    assert ".adding-" not in said
    store.pipe("/b/f/a\nb.png", PICTURES["000000.png"])
    assert "control characters" in refused(root, "memory://b/f")
    assert "memory://b/gone.zip: no such file" in refused(root, "memory://b/gone.zip?signature=secret")


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("zip://a.png::file:///etc/x.zip", "chained URLs"),
        ("simplecache::memory://b/x.tar", "chained URLs|no such file"),
        ("reference://x", "unknown scheme reference://"),
        ("gopher://host/x.tar", "unknown scheme gopher://"),
    ],
)
def test_only_the_scheme_given_is_followed(root: Path, where: str, why: str) -> None:
    with pytest.raises(archives.DumpRefused, match=why):
        add(root, where)


def test_a_missing_driver_is_named_with_its_package(root: Path) -> None:
    if importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed here")
    assert refused(root, "s3://key:word@bucket/x.tar?v=1") == (
        "s3://bucket/x.tar: no driver for s3://; `pip install s3fs`"
    )


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", path.removeprefix("/to/").replace("~", "://"))
                self.end_headers()
                return
            body = tar(PICTURES) if path.endswith("/night.tar") else b""
            if path == "/list/":
                body = b'<a href="?C=N;O=D">Name</a> <a href="/">Up</a> <a href="night.tar">night.tar</a> <a href="#">top</a>'
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: 9000 if "cut" in self.path else None])

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_over_http_with_a_signed_link_and_redirects(root: Path, web: str) -> None:
    assert "cut short" in (said := refused(root, f"{web}/night.tar?cut&signature=secret")) or "Payload" in said
    assert "secret" not in said
    assert "no such file" in refused(root, f"{web}/gone.tar?signature=secret")
    for target in ("file~/etc/passwd", "ftp~127.0.0.1/x"):
        assert refused(root, f"{web}/to/{target}")
    added = add(root, f"{web}/to/{web.replace('://', '~')}/night.tar?signature=secret")  # http to http is followed
    assert (added.name, added.images) == ("night", 8)
    assert "secret" not in (root / "dumps.yaml").read_text()
    assert list(dump_registry.read_dumps(root / "dumps.yaml").dumps) == ["base", "night"]


def test_links_that_sort_a_web_servers_listing_are_no_files(root: Path, web: str) -> None:
    added = add(root, f"{web}/list/")
    assert (added.images, added.skipped) == (8, [])


def test_a_redirect_to_another_web_scheme_is_refused(web: str) -> None:
    place = remote.RemotePlace(f"{web}/night.tar")
    place.scheme = "https"  # as if it had been asked for so and answered by a redirect to http
    with pytest.raises(archives.DumpRefused, match="redirects from https:// to another scheme"):
        list(place._pieces(place.path, 100))
