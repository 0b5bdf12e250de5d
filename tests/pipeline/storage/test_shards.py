"""Shards: any tar tool reads them, equal content gives equal bytes, a member costs one read of its own length."""

import subprocess
import tarfile
from pathlib import Path

import pytest

from pipeline.storage import shards


def content(count: int) -> list[tuple[str, bytes]]:
    return [(f"{n:08d}.png", bytes([n % 251]) * (37 * n % 3000)) for n in range(count)]


def test_members_are_read_back_by_offset_and_by_other_tools(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    items = [*content(30), ("images/" + "long/" * 40 + "ü.jpg", b"deep")]
    assert shards.write_tar(path, items) == 31
    found = shards.members(path)
    assert [(m.name, shards.read(path, m.offset, m.length)) for m in found] == items
    with tarfile.open(path) as tar:
        assert [(m.name, tar.extractfile(m).read()) for m in tar] == items  # type: ignore[union-attr]
    assert subprocess.run(["tar", "-tf", str(path)], capture_output=True, check=True).stdout.count(b"\n") == 31


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        shards.write_tar(tmp_path / name, content(5))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_new_shard_starts_at_the_limit(tmp_path: Path) -> None:
    items = [(f"{n}.bin", bytes([n]) * 4000) for n in range(10)] + [("big.bin", b"b" * 50_000)]
    with shards.Shards(tmp_path, "images", 16_000) as writer:
        places = [writer.add(name, data) for name, data in items]
    assert len({shard for shard, _, _ in places}) == len(list(tmp_path.iterdir())) == 5
    assert [shards.read(tmp_path / s, o, n) for s, o, n in places] == [data for _, data in items]
    for path in sorted(tmp_path.iterdir())[:-1]:  # only a file larger than the limit may exceed it
        assert path.stat().st_size <= 16_000 + 2 * shards.BLOCK
        shards.members(path)


def bytes_read() -> int:
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel's count of bytes read is Linux's")
def test_a_read_costs_its_own_length_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    shards.write_tar(path, ((f"{n}.bin", bytes([n]) * 1_000_000) for n in range(30)))
    first, *_, last = shards.members(path)
    before = bytes_read()
    nothing = bytes_read() - before  # what reading the counter itself costs
    for member in (first, last):
        before = bytes_read()
        data = shards.read(path, member.offset, 1000)
        cost = bytes_read() - before - nothing
        assert data == data[:1] * 1000
        assert cost == 1000


def test_truncated_archive_and_short_shard_are_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    shards.write_tar(path, [("a.bin", b"a" * 5000), ("b.bin", b"b" * 5000)])
    *_, last = shards.members(path)
    path.write_bytes(path.read_bytes()[: last.offset + 100])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        shards.members(path)
    with pytest.raises(ValueError, match=r"cut\.tar.*5000 bytes expected.*100 found"):
        shards.read(path, last.offset, last.length)
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"cut\.tar"):
        shards.members(path)
