"""Images are told by their content; companions never take a picture's name."""

from pathlib import Path

from pipeline.formats.common.source import walk_all
from pipeline.formats.names import image_files, skipped

PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)


def _folder(folder: Path, **contents: bytes) -> dict[str, Path]:
    found = {}
    for number, (name, data) in enumerate(contents.items()):
        path = folder / str(number)
        path.write_bytes(data)
        found[name] = path
    return found


def test_sidecars_systems_files_and_raws_are_no_images(tmp_path):
    files = _folder(
        tmp_path,
        **{
            "x.png": PNG, "x.json": b"{}", "x.pgw": b"1.0", "IMG.AAE": b"<plist/>", "IMG.CR2": b"II*\x00" + bytes(30),
            "Thumbs.db": b"\xd0\xcf", "__MACOSX/x.png": PNG, "._x.png": PNG, "no_extension": PNG, "bad.jpg": b"",
        },
    )  # fmt: skip

    found = image_files.images_among(files)

    assert list(found.images) == ["x.png", "no_extension", "bad.jpg"]  # a bad picture is told when it is decoded
    assert {name for _, name in found.skipped} == files.keys() - found.images.keys()


def test_each_kind_is_one_row_with_its_first_name():
    assert skipped.rows([("raw", "a"), ("sidecar", "b"), ("raw", "c")]) == [
        ("passed over: raw", "2, the first: a"),
        ("passed over: sidecar", "1, the first: b"),
    ]


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "store.png").write_bytes(PNG)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").symlink_to((tmp_path / "store.png").resolve())
    (tmp_path / "images/dead.png").symlink_to(tmp_path / "gone.png")

    found = image_files.images_among(walk_all(tmp_path / "images"))

    assert list(found.images) == ["a.png"]
    assert found.skipped == [("a link that leads nowhere", "dead.png")]
