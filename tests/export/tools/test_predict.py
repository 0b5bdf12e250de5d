"""export.tools.predict and `marginalia predict`: real files of every kind, through the real command line."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.runtime import runtime
from export.tools import inputs as sources
from export.tools import predict
from pipeline.imaging import decode
from pipeline.storage import archives
from tests.support import image_files, tiny_onnx

ROOT = Path(__file__).parents[3]
RNG = np.random.default_rng(11)
ABSENT = "torch,torchvision,pyarrow,dvc,dvclive,onnx,onnxscript,matplotlib,training"


def run(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "marginalia", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> runtime.Runtime:
    return runtime.Runtime(tiny_onnx.write(tmp_path_factory.mktemp("b") / "bundle"), provider="cpu", threads=1)


def noise(width: int, height: int) -> Image.Image:
    coarse = RNG.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


def good_files() -> dict[str, bytes]:
    """Pictures by their place in a folder, of all kinds that are read."""
    deep = RNG.integers(0, 1 << 16, (20, 33), dtype=np.uint16)
    return {
        "a.jpg": image_files.save(noise(90, 50), "JPEG"),
        "a.png": image_files.save(noise(31, 600)),
        "A.bmp": image_files.save(noise(16, 16), "BMP"),
        "rotated.jpg": image_files.save(noise(80, 40), "JPEG", exif=image_files.exif(6)),
        "palette.png": image_files.save(noise(40, 40).quantize(9)),
        "sub/sixteen.png": image_files.save(Image.fromarray(deep)),
        "sub/deeper/[red] ünï.webp": image_files.save(noise(64, 200), "WEBP", lossless=True),
        "no_extension": image_files.save(noise(12, 13)),
        "overlays/a.png": image_files.save(noise(20, 20)),
    }


def bad_files() -> dict[str, bytes]:
    whole = image_files.save(noise(60, 60), "JPEG")
    frames = [noise(8, 8), noise(8, 8)]
    return {
        "bad/half.jpg": whole[: len(whole) // 2],
        "bad/text.png": b"no picture",
        "bad/empty.tif": b"",
        "bad/moving.webp": image_files.save(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
    }


def passed_over() -> dict[str, bytes]:
    return {"README.txt": b"hello", ".hidden.png": image_files.save(noise(9, 9)), "__MACOSX/a.jpg": b"\0\0"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, data in (good_files() | bad_files() | passed_over()).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "bad" / "dangling.jpg").symlink_to(folder / "nothing.jpg")
    return folder


NAMES = {
    "A.bmp": "A", "a.jpg": "a~2", "a.png": "a~3", "rotated.jpg": "rotated", "palette.png": "palette",
    "sub/sixteen.png": "sub/sixteen", "sub/deeper/[red] ünï.webp": "sub/deeper/[red] ünï",
    "no_extension": "no_extension", "overlays/a.png": "overlays~/a",
}  # fmt: skip


def written_files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def pictures_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in written_files(folder).items() if name.endswith((".png", ".jpg"))}


@pytest.fixture(scope="module")
def answered(opened: runtime.Runtime, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("o") / "new" / "out"
    done = run("predict", opened.bundle.folder, photos, "-o", output, "--confidence", "--provider", "cpu")
    assert done.returncode == 0, done.stderr
    for said in ("images", "9", "quarantined", "5", "cpu", "fp32", opened.bundle.manifest.id, "bad/half.jpg", "green"):
        assert said in done.stdout
    return output


def test_masks_are_what_the_runtime_says(answered: Path, photos: Path, opened: runtime.Runtime) -> None:
    for file, name in NAMES.items():
        image_HWC = decode.decode((photos / file).read_bytes(), max_pixels=1 << 20)
        found = opened.segment(image_HWC)
        with Image.open(answered / f"{name}.png") as mask:
            np.testing.assert_array_equal(np.asarray(mask), found.label_HW)
            assert mask.getpalette()[:12] == [channel for item in tiny_onnx.CLASSES for channel in item["color"]]
        with Image.open(answered / "confidence" / f"{name}.png") as grey:
            np.testing.assert_array_equal(np.asarray(grey), found.confidence_HW)
        with Image.open(answered / "overlays" / f"{name}.jpg") as overlay:
            assert overlay.format == "JPEG"
            assert overlay.size == found.label_HW.shape[::-1]
    assert Image.open(answered / "rotated.png").size == (40, 80)


def test_nothing_else_is_written(answered: Path) -> None:
    wanted = {"predictions.csv", "predictions.json", "quarantine.json"}
    for name in NAMES.values():
        wanted |= {f"{name}.png", f"overlays/{name}.jpg", f"confidence/{name}.png"}
    assert set(written_files(answered)) == wanted


def test_an_overlay_blends_the_picture_with_the_classes(answered: Path, photos: Path) -> None:
    with Image.open(answered / "a~3.png") as mask, Image.open(photos / "a.png") as image:
        colours = np.array([item["color"] for item in tiny_onnx.CLASSES])[np.asarray(mask)]
        blended = ((np.asarray(image, np.float64) + colours) / 2).round().astype(np.uint8)
    wanted = np.asarray(
        Image.open(io.BytesIO(image_files.save(Image.fromarray(blended), "JPEG", quality=90))), np.float64
    )
    with Image.open(answered / "overlays" / "a~3.jpg") as overlay:
        assert np.abs(np.asarray(overlay, np.float64) - wanted).mean() < 2


def test_the_lists_say_what_was_done(answered: Path, photos: Path, opened: runtime.Runtime) -> None:
    said = json.loads((answered / "predictions.json").read_text())
    rows = list(csv.DictReader(io.StringIO((answered / "predictions.csv").read_text())))
    assert {Path(item["file"]).relative_to(photos).as_posix(): item["mask"] for item in said["images"]} == {
        file: f"{name}.png" for file, name in NAMES.items()
    }
    assert [row["mask"] for row in rows] == [item["mask"] for item in said["images"]]
    assert (said["bundle"], said["provider"], said["precision"]) == (opened.bundle.manifest.id, "cpu", "fp32")
    for row, item in zip(rows, said["images"], strict=True):
        label_HW = np.asarray(Image.open(answered / item["mask"]))
        assert (item["height"], item["width"]) == label_HW.shape == (int(row["height"]), int(row["width"]))
        for known in tiny_onnx.CLASSES:
            assert item["area"][known["name"]] == (label_HW == known["id"]).mean()
            assert float(row[f"area {known['name']}"]) == pytest.approx(item["area"][known["name"]], abs=1e-6)
        grey = np.asarray(Image.open(answered / "confidence" / item["mask"]))
        assert item["confidence"] == pytest.approx(grey.mean() / 255)
        assert 0 < item["seconds"] < said["seconds"] + 60
    codes = {Path(q["file"]).name: q["code"] for q in json.loads((answered / "quarantine.json").read_text())}
    assert codes == {
        "half.jpg": "truncated", "text.png": "not-an-image", "empty.tif": "empty", "moving.webp": "animated",
        "dangling.jpg": "unreadable",
    }  # fmt: skip


def test_a_second_run_changes_nothing(answered: Path, photos: Path, opened: runtime.Runtime) -> None:
    before = written_files(answered)
    assert run("predict", opened.bundle.folder, photos, "-o", answered, "--confidence").returncode == 0
    after = written_files(answered)
    assert after.keys() == before.keys()
    assert pictures_of(answered) == {name: before[name] for name in pictures_of(answered)}
    assert after["quarantine.json"] == before["quarantine.json"]


def pack(path: Path, content: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
            for name, data in content.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["photos.zip", "photos.tar", "photos.tar.gz"])
def test_an_archive_gives_what_its_folder_gives(
    kind: str, photos: Path, opened: runtime.Runtime, tmp_path: Path
) -> None:
    content = {
        path.relative_to(photos).as_posix(): path.read_bytes() for path in sorted(photos.rglob("*")) if path.is_file()
    }
    archive = pack(tmp_path / kind, content)
    from_folder = predict.predict(opened.bundle.folder, [photos], tmp_path / "folder")
    from_archive = predict.predict(opened.bundle.folder, [archive], tmp_path / "archive")
    assert pictures_of(tmp_path / "archive") == pictures_of(tmp_path / "folder")
    assert from_archive.images[0].file == f"{archive}/A.bmp"
    assert len(from_archive.quarantined) == len(from_folder.quarantined) - 1  # the link, which no archive may hold


def test_a_hostile_archive_is_left_out_whole_and_keeps_no_name(opened: runtime.Runtime, tmp_path: Path) -> None:
    data = image_files.save(noise(20, 20))
    hostile = pack(tmp_path / "hostile.tar", {"x.png": data, "../out.png": data})
    cut = pack(tmp_path / "cut.tar.gz", {"y.png": data, "z.png": data})
    cut.write_bytes(cut.read_bytes()[:-40])
    good = pack(tmp_path / "good.zip", {"x.png": data})
    result = predict.predict(opened.bundle.folder, [hostile, cut, good], tmp_path / "out")
    assert [item.mask for item in result.images] == ["x.png"]
    assert [(Path(q.file).name, q.code) for q in result.quarantined] == [
        ("hostile.tar", "archive"), ("cut.tar.gz", "archive"),
    ]  # fmt: skip


def test_several_inputs_with_the_same_names(opened: runtime.Runtime, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(image_files.save(noise(20, 20)))
    inputs = [tmp_path / "one", tmp_path / "two", tmp_path / "one" / "a.png"]
    result = predict.predict(opened.bundle.folder, inputs, tmp_path / "out", predict.Options(overlay=False))
    assert [item.mask for item in result.images] == ["a.png", "a~2.png", "a~3.png"]
    assert not (tmp_path / "out" / "overlays").exists()


def test_names_never_meet() -> None:
    taken: dict[str, int] = {}
    paths = [
        "a.jpg",
        "a~2.png",
        "a.png",
        "A.tif",
        "b.png/c.jpg",
        "Confidence/a.jpg",
        "x" * 250 + ".jpg",
        "x" * 240 + ".png",
    ]
    names = [sources.unique(path, taken) for path in paths]
    assert names[:6] == ["a", "a~2", "a~3", "A~4", "b.png~/c", "Confidence~/a"]
    assert len({name.casefold() for name in names}) == len(paths)
    assert max(map(len, names)) < 210


def test_the_same_extensions_as_a_dump() -> None:
    assert sources.EXTENSIONS == archives.EXTENSIONS


def test_exit_codes(opened: runtime.Runtime, tmp_path: Path) -> None:
    bundle = opened.bundle.folder
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff broken")
    done = run("predict", bundle, broken, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert [q["code"] for q in json.loads((tmp_path / "out" / "quarantine.json").read_text())] == ["corrupt"]
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ((bundle, tmp_path / "absent.png"), "absent.png: no such file or folder"),
        ((bundle, tmp_path / "empty"), "no image in"),
        ((tmp_path / "no_bundle", broken), "no bundle folder here"),
    ):
        done = run("predict", *arguments, "-o", tmp_path / "never")
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    done = run("predict", bundle, broken, "--provider", "abacus", "-o", tmp_path / "never")
    assert done.returncode == 2
    assert "'abacus' is not one of" in done.stderr
    assert not (tmp_path / "never").exists()


def test_outputs_never_become_inputs(opened: runtime.Runtime, tmp_path: Path) -> None:
    folder, bundle = tmp_path / "in" / "in", opened.bundle.folder
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(data := image_files.save(noise(20, 20)))
    for inputs, output in (
        ([folder], folder), ([folder], folder / "out"), ([tmp_path / "in"], tmp_path), ([folder / "a.png"], folder),
    ):  # fmt: skip
        with pytest.raises(sources.SourceError, match="output folder"):
            predict.predict(bundle, inputs, output)
    assert written_files(tmp_path) == {"in/in/a.png": data}
    assert len(predict.predict(bundle, [folder], folder / ".out").images) == 1  # hidden: never read
    assert len(predict.predict(bundle, [folder], folder.parent / "beside").images) == 1
    assert len(predict.predict(bundle, [folder], tmp_path / "out").images) == 1


def test_only_its_own_files_are_replaced(opened: runtime.Runtime, tmp_path: Path) -> None:
    """A mask beside its photograph has the very name of the answer."""
    data, bundle = image_files.save(noise(20, 20)), opened.bundle.folder
    for name in ("data/a.jpg", "data/a.png", "link/in/trip/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    before = written_files(tmp_path)
    with pytest.raises(sources.SourceError, match="did not write and might replace"):
        predict.predict(bundle, [tmp_path / "data/a.jpg"], tmp_path / "data")
    inside = written_files(bundle)
    for output in (bundle, bundle / "out"):
        with pytest.raises(sources.SourceError, match="lies in the bundle"):
            predict.predict(bundle, [tmp_path / "data"], output)
    assert written_files(bundle) == inside
    output = tmp_path / "out"
    predict.predict(bundle, [tmp_path / "data/a.jpg"], output)
    (output / "trip").symlink_to(tmp_path / "link/in/trip")
    with pytest.raises(sources.SourceError, match="overwrite an input"):
        predict.predict(bundle, [tmp_path / "link/in"], output)
    assert len(predict.predict(bundle, [tmp_path / "data/a.jpg"], output).images) == 1  # its own, again
    assert {k: v for k, v in written_files(tmp_path).items() if k in before} == before


def test_a_hostile_archive_whose_name_is_no_text_is_left_out_whole(opened: runtime.Runtime, tmp_path: Path) -> None:
    archive = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.zip"))
    data = image_files.save(noise(20, 20))
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("x.png", data)
        target.writestr("../o.png", data)
        target.writestr("a" * 251 + ".png/y.png", data)
    result = predict.predict(opened.bundle.folder, [archive], tmp_path / "out")
    assert [q.code for q in result.quarantined] == ["archive"]
    assert set(written_files(tmp_path / "out")) == {"predictions.csv", "predictions.json", "quarantine.json"}
    with zipfile.ZipFile(tmp_path / "long.zip", "w") as target:
        target.writestr("ok.png", data)
        target.writestr("a" * 251 + ".png/y.png", data)
    result = predict.predict(opened.bundle.folder, [tmp_path / "long.zip"], tmp_path / "long")
    assert [item.mask for item in result.images] == ["ok.png"]
    assert [q.code for q in result.quarantined] == ["name-too-long"]


def test_one_image_that_the_model_fails_on(
    opened: runtime.Runtime, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runtime.Runtime.run

    def sometimes(self: runtime.Runtime, images_NHWC: np.ndarray) -> object:
        if images_NHWC.shape[1:3] == (16, 16) and images_NHWC.max() > 0:
            raise RuntimeError("out of memory\nat line 3")
        return real(self, images_NHWC)

    monkeypatch.setattr(runtime.Runtime, "warm_up", lambda self: None)
    monkeypatch.setattr(runtime.Runtime, "run", sometimes)
    result = predict.predict(opened.bundle.folder, [photos / "A.bmp", photos / "a.png"], tmp_path / "out")
    assert [q.code for q in result.quarantined] == ["runtime"]
    assert "out of memory" in result.quarantined[0].reason
    assert [item.mask for item in result.images] == ["a~2.png"]


def test_an_interrupt_leaves_whole_files(opened: runtime.Runtime, tmp_path: Path) -> None:
    folder, output = tmp_path / "many", tmp_path / "out"
    folder.mkdir()
    data = image_files.save(noise(400, 400))
    for number in range(600):
        (folder / f"{number}.png").write_bytes(data)
    command = [
        sys.executable,
        "-m",
        "marginalia",
        "predict",
        str(opened.bundle.folder),
        str(folder),
        "-o",
        str(output),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    while process.poll() is None and len(list(output.glob("*.png"))) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) not in (0, -signal.SIGKILL)
    found = written_files(output)
    assert 5 <= len(found) < 1200
    assert not [name for name in found if name.endswith(".part")]
    assert json.loads(found.pop("predictions.json"))["images"] == []  # not those of an earlier run
    found.pop("predictions.csv"), found.pop("quarantine.json")
    for name in found:
        Image.open(output / name).load()


@pytest.mark.slow
def test_the_base_install_is_enough(opened: runtime.Runtime, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        f"absent = set({ABSENT!r}.split(','))\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in absent:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    done = run("predict", opened.bundle.folder, photos / "a.jpg", "-o", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    student = tmp_path / "student.safetensors"
    student.write_bytes(b"")
    out = tmp_path / "bench.json"
    arguments = ("--sizes", "32x16", "--batches", "1", "--rounds", "1", "--student", student, "--out", out)
    done = run("bench", opened.bundle.folder, *arguments, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = {row["runtime"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["onnxruntime"]["p50_ms"] > 0
    assert "torch is not installed; it comes with the train extra" in rows["torch eager"]["failed"]
    assert "train extra" in done.stdout
