"""A bundle in Python: the same answers as over HTTP, in every form, and named errors for what is no image."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import marginalia
from pipeline.imaging import label_maps
from tests.support import live_server, tiny_onnx
from tests.support.image_files import save

RNG = np.random.default_rng(8)
PIXELS = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
PIXELS[5:20, 10:30] = (250, 10, 20)  # a red patch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    bundle = tiny_onnx.write(tmp_path_factory.mktemp("model") / "bundle")
    with marginalia.load(bundle.folder, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def result(model):
    return model.predict(PIXELS)


def test_every_form_of_an_image_has_the_same_answer(model, result, tmp_path):
    encoded = save(Image.fromarray(PIXELS))
    file = tmp_path / "image.png"
    file.write_bytes(encoded)
    for given in (str(file), file, encoded, Image.fromarray(PIXELS), PIXELS[:, ::-1][:, ::-1]):
        assert np.array_equal(model.predict(given).mask, result.mask)
    grey = model.predict(PIXELS[..., 0])
    assert np.array_equal(grey.mask, model.predict(np.stack([PIXELS[..., 0]] * 3, axis=2)).mask)
    wanted = np.argmax(np.concatenate([np.full((40, 60, 1), 100), PIXELS], axis=2), axis=2)
    assert np.array_equal(result.mask, wanted)
    assert np.allclose(result.confidence, PIXELS.max(2) / 255)


@pytest.mark.parametrize(("view", "ending"), [("mask", ".png"), ("overlay", ".jpg"), ("geojson", ".geojson")])
def test_what_is_saved_is_what_the_service_answers(tmp_path, view, ending):
    """Byte for byte where it is a picture; the same polygons. A photograph larger than the model's long side."""
    server = live_server.shared()
    model = marginalia.load(server.folder / "champions/first/bundle", threads=1)
    image = save(Image.fromarray(RNG.integers(0, 256, (90, 700, 3), dtype=np.uint8)).resize((700, 300)), "JPEG")
    accept = {"mask": "image/png", "overlay": "image/jpeg", "geojson": "application/geo+json"}[view]
    with server.client() as http:
        headers = {"Content-Type": "image/jpeg", "Accept": accept}
        served = http.post("/v1/segment", content=image, headers=headers, params={"view": view})
    saved = model.predict(image).save(tmp_path / f"answer{ending}")
    if view == "geojson":
        assert json.loads(saved.read_text()) == served.json()
    else:
        assert saved.read_bytes() == served.content


def test_areas_are_the_shares_of_the_mask_largest_first(result):
    for item in result.classes:
        share = float((result.mask == item.id).mean())
        assert result.areas.get(item.name, 0.0) == pytest.approx(share)
    assert list(result.areas.values()) == sorted(result.areas.values(), reverse=True)
    assert sum(result.areas.values()) == pytest.approx(1)


def test_coco_gives_the_mask_back(result):
    whole = result.to_coco(image_id=7, file_name="image.png")
    assert whole["images"] == [{"id": 7, "file_name": "image.png", "width": 60, "height": 40}]
    painted = np.full(result.mask.shape, 255, np.uint8)
    for item in whole["annotations"]:
        inside = label_maps.from_rle(item["segmentation"])
        painted[inside] = item["category_id"] - 1
        assert item["area"] == inside.sum()
        left, top, width, height = item["bbox"]
        rows, columns = np.nonzero(inside)
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width - 1, top + height - 1) == (columns.max(), rows.max())
    assert np.array_equal(painted, result.mask)
    assert {item["id"]: item["name"] for item in whole["categories"]}[2] == "red"


def test_an_overlay_goes_from_the_image_to_the_colours(result):
    assert np.array_equal(np.asarray(result.overlay(0)), PIXELS)
    colours = np.array([item.color for item in result.classes], np.uint8)
    assert np.array_equal(np.asarray(result.overlay(1)), colours[result.mask])
    with pytest.raises(ValueError, match=r"alpha 1\.5"):
        result.overlay(1.5)


def test_a_saved_mask_is_read_back_as_class_ids(result, tmp_path):
    saved = result.save(tmp_path / "deep" / "mask.png")
    with Image.open(saved) as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), result.mask)
    with pytest.raises(ValueError, match=r"by its ending what to write: \.png"):
        result.save(tmp_path / "mask.bmp")
    assert list((tmp_path).rglob("*.bmp*")) == []


@pytest.mark.parametrize(
    ("given", "code", "word"),
    [
        (b"this is no picture", "not-an-image", "no image"),
        (b"", "empty", "bytes"),
        (np.zeros((4, 4, 3)), "unsupported-depth", "float64"),
        (np.zeros((4, 4, 4), np.uint8), "not-an-image", r"\(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), "not-an-image", "shape"),
        (save(Image.fromarray(PIXELS))[:300], "truncated", "ends after"),
    ],
    ids=["text", "nothing", "floats", "four channels", "no rows", "half a file"],
)
def test_what_is_no_image_is_refused_with_the_services_code(model, given, code, word):
    with pytest.raises(marginalia.ImageError, match=word) as refused:
        model.predict(given)
    assert refused.value.code == code


def test_errors_name_the_file(model, tmp_path):
    file = tmp_path / "broken.jpg"
    file.write_bytes(b"text")
    with pytest.raises(marginalia.ImageError, match=r"broken\.jpg: "):
        model.predict(file)
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        model.predict(tmp_path / "absent.jpg")
    with pytest.raises(marginalia.BundleError, match="nowhere"):
        marginalia.load(tmp_path / "nowhere")
    with pytest.raises(marginalia.ProviderError, match="CUDA was asked for"):
        marginalia.load(tiny_onnx.write(tmp_path / "bundle").folder, provider="cuda")


def test_importing_it_is_light_and_every_public_name_is_there():
    """In a process of its own, outside the checkout's folder."""
    code = (
        "import sys, marginalia; before = set(sys.modules);"
        "heavy = [m for m in before if m.split('.')[0] in ('torch', 'numpy', 'bentoml', 'pydantic', 'typer', 'PIL')];"
        "assert not heavy, heavy;"
        "assert all(getattr(marginalia, name) is not None for name in marginalia.__all__);"
        "assert 'torch' not in sys.modules and 'bentoml' not in sys.modules;"
        "from marginalia import *; print(load, Model, Result, Client)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match=r"public are .*load"):
        marginalia.nothing  # noqa: B018


def test_the_forms_of_a_result_are_its_words(result, model):
    assert repr(result).startswith("<marginalia.Result 60 x 40: ")
    assert repr(model).startswith(f"<marginalia.Model {result.bundle} of 4 classes on onnxruntime")
    buffer = io.BytesIO()
    result.overlay().save(buffer, "PNG")
    assert buffer.getvalue()
