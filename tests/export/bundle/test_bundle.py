"""export.bundle.bundle: what is written can be verified, by us and by sha256sum; what is wrong is not written."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from export.bundle import bundle
from tests.support import tiny_onnx


def test_a_bundle_round_trips(tmp_path: Path) -> None:
    made = tiny_onnx.write(tmp_path / "bundle")
    assert sorted(p.name for p in made.folder.iterdir()) == ["MODEL_CARD.md", "SHA256SUMS", "bundle.json", "model.onnx"]
    opened = bundle.open_bundle(tmp_path / "bundle")
    assert opened == made
    assert opened.read_model() == tiny_onnx.model()
    assert bundle.verify(made.folder) == made.manifest
    stored = json.loads((made.folder / "bundle.json").read_text())
    assert stored["id"] == made.manifest.id
    assert stored["format"] == 1
    assert stored["classes"] == tiny_onnx.CLASSES
    assert stored["input"] == {"layout": "NHWC", "dtype": "uint8", "channels": "RGB", "long_side": 64, "stride": 16}
    assert made.manifest.palette == [tuple(item["color"]) for item in tiny_onnx.CLASSES]
    assert (made.fit(200, 100).padded_height, made.fit(200, 100).padded_width) == (64, 32)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="coreutils' sha256sum is the judge here")
def test_sums_are_what_sha256sum_reads(tmp_path: Path) -> None:
    made = tiny_onnx.write(tmp_path / "bundle")
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=made.folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == 3


def test_the_id_follows_model_classes_and_policy_only(tmp_path: Path) -> None:
    same = {tiny_onnx.write(tmp_path / str(i), **changes).manifest.id for i, changes in enumerate(
        [{}, {"card": "other"}, {"metrics": {}}, {"created": "2027-02-02T00:00:00+00:00"}, {"commit": "f" * 40}]
    )}  # fmt: skip
    assert len(same) == 1
    renamed = [tiny_onnx.CLASSES[0] | {"name": "night"}, *tiny_onnx.CLASSES[1:]]
    others = [
        {"model_bytes": tiny_onnx.model(101.0)},
        {"classes": renamed},
        {"long_side": 80},
        {"stride": 32},
    ]
    found = {tiny_onnx.write(tmp_path / f"o{i}", **changes).manifest.id for i, changes in enumerate(others)}
    assert len(found) == 4
    assert not found & same


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"classes": []}, "classes"),
        ({"classes": [*tiny_onnx.CLASSES, tiny_onnx.CLASSES[0]]}, "rise"),
        ({"classes": [{"id": 255, "name": "x", "color": [0, 0, 0]}]}, "id"),
        ({"classes": [{"id": 0, "name": "x", "color": [0, 0, 256]}]}, "color"),
        ({"ignore": 3}, "ignore"),
        ({"stride": 0}, "stride"),
        ({"model_bytes": b"hello, this is no protobuf"}, "model.onnx"),
    ],
)
def test_a_wrong_bundle_is_not_written_and_the_old_one_stays(tmp_path: Path, changes: dict, named: str) -> None:
    old = tiny_onnx.write(tmp_path / "bundle")
    with pytest.raises(ValueError, match=named):  # of the description, or a BundleError
        tiny_onnx.write(tmp_path / "bundle", **changes)
    assert bundle.open_bundle(tmp_path / "bundle") == old
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_replacing_leaves_nothing_behind(tmp_path: Path) -> None:
    tiny_onnx.write(tmp_path / "bundle")
    fresh = tiny_onnx.write(tmp_path / "bundle", model_bytes=tiny_onnx.model(7.0))
    assert bundle.open_bundle(tmp_path / "bundle") == fresh
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_model_changed_after_verifying_is_not_read(tmp_path: Path) -> None:
    made = tiny_onnx.write(tmp_path / "bundle")
    (made.folder / "model.onnx").write_bytes(tiny_onnx.model(3.0))
    with pytest.raises(bundle.BundleError, match=r"model\.onnx: changed"):
        made.read_model()


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(bundle.BundleError, match="no bundle folder"):
        bundle.open_bundle(tmp_path / "absent")


def test_a_failed_rename_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that brings the new folder in, after the old one was moved aside."""
    old = tiny_onnx.write(tmp_path / "bundle")
    failed = []
    for name in ("rename", "replace"):
        real = getattr(os, name)

        def failing(source, target, *rest, real=real, **options):
            if Path(target) == tmp_path / "bundle" and not failed:
                failed.append(source)
                raise OSError("no space left on device")
            return real(source, target, *rest, **options)

        monkeypatch.setattr(os, name, failing)
    with pytest.raises(OSError, match="no space"):
        tiny_onnx.write(tmp_path / "bundle", model_bytes=tiny_onnx.model(250.0))
    assert len(failed) == 1
    assert bundle.open_bundle(tmp_path / "bundle") == old
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
