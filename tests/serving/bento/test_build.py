"""A bento with a bundle inside, built by the command line and served from a folder that has nothing to do with it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from export.bundle import bundle
from serving.bento import build
from tests.support import live_server, tiny_onnx
from tests.support.image_files import save
from tests.support.live_server import ROOT, Server

THRESHOLD = 180.0  # not the tiny champion's that every test server starts with
MARK = b"<!-- this page lies in the bento -->"


@dataclass(frozen=True)
class Packed:
    """A served bento: its folder, the bundle's id, and the folders that a read-only root file system would hold."""

    server: Server
    folder: Path
    bundle: str
    read_only: list[Path]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packed]:
    top = tmp_path_factory.mktemp("bento")
    home, away, store, scratch = (top / name for name in ("home", "away", "store", "scratch"))
    for folder in (home, away, scratch):
        folder.mkdir()
    made = tiny_onnx.write(top / "bundle", model_bytes=tiny_onnx.model(THRESHOLD))
    command = [sys.executable, "-m", "marginalia", "bento", str(made.folder)]
    environment = os.environ | {"BENTOML_HOME": str(store), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    built = subprocess.run(command, cwd=away, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (found,) = (path.parent for path in store.glob("bentos/marginalia/*/bento.yaml"))
    assert built.stdout.startswith(f"marginalia:{found.name}: in {found};")
    page = found / "src/serving/web/index.html"
    page.write_bytes(page.read_bytes() + MARK)
    for path in (made.folder / "model.onnx", *made.folder.iterdir()):  # what was packed is not what is served
        path.unlink(missing_ok=True)
    settings = {
        "BENTOML_HOME": str(store), "HOME": str(home), "TMPDIR": str(scratch), "PYTHONPATH": "",
        "PYTHONDONTWRITEBYTECODE": "1", "MARGINALIA_CHAMPIONS": str(top / "absent.json"),
    }  # fmt: skip
    serve = ["-m", "bentoml", "serve", "marginalia:latest", "--host", "127.0.0.1", "--port", "{port}"]
    server = live_server.start(settings, serve, cwd=away)
    yield Packed(server, found, made.manifest.id, [home, away])
    server.stop()


@pytest.mark.slow
def test_it_answers_with_the_bundle_inside(packed: Packed) -> None:
    image_HWC = np.random.default_rng(3).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    with packed.server.client() as http:
        assert http.get("/v1/model").json()["bundle"] == packed.bundle
        headers = {"Content-Type": "image/png"}
        response = http.post("/v1/segment", content=save(Image.fromarray(image_HWC)), headers=headers)
        assert response.headers["x-bundle-id"] == packed.bundle
        mask_HW = np.asarray(Image.open(response))
        assert http.get("/").content.endswith(MARK)  # the code is the bento's too
    assert np.array_equal(mask_HW, tiny_onnx.expected(image_HWC[None], THRESHOLD)[0][0])


@pytest.mark.slow
def test_it_writes_only_where_it_is_told(packed: Packed) -> None:
    """What a read-only root file system needs: nothing below HOME and the working folder, all below two folders."""
    for folder in packed.read_only:
        assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_what_lies_in_it(packed: Packed) -> None:
    inside = bundle.open_bundle(packed.folder / "src/bundle")
    facts = yaml.safe_load((packed.folder / "bento.yaml").read_text())
    assert inside.manifest.id == packed.bundle == facts["labels"]["bundle"]
    rooms = {path.name for path in (packed.folder / "src").iterdir() if path.is_dir()}
    assert rooms == {*build.PACKAGES, "bundle"}
    needed = set((packed.folder / "env/python/requirements.txt").read_text().split())
    assert set(build.requirements()) == needed
    names = {line.partition("==")[0].partition("[")[0] for line in needed}
    assert {"bentoml", "numpy", "pillow", "starlette"} < names
    assert names.isdisjoint({"torch", "dvc", "pytest", "onnx", build.DISTRIBUTION})


def test_a_bad_bundle_makes_no_bento(tmp_path: Path) -> None:
    made = tiny_onnx.write(tmp_path / "bundle")
    (made.folder / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(bundle.BundleError, match=r"model\.onnx: does not match"):
        build.stage(made.folder, tmp_path / "stage")
    assert not (tmp_path / "stage").exists()
