"""No skew between training's evaluation and the bundle: the same files, of every kind and size, by both ways."""

import io
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.bundle import bundle
from export.runtime import runtime
from pipeline import config
from pipeline.champions import metrics as scores
from pipeline.imaging import decode, label_maps, resize
from pipeline.storage import manifest, shards
from tests.support import tiny_project
from training import evaluate, inference, metrics
from training.models import segmenter


def encode(image_HWC: np.ndarray, kind: str) -> bytes:
    """A file that decodes to (nearly) `image_HWC` by the rules of pipeline.imaging.decode."""
    out = io.BytesIO()
    picture = Image.fromarray(image_HWC)
    if kind == "exif":  # stored turned, with the tag that turns it back
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.transpose(Image.Transpose.ROTATE_90).save(out, "JPEG", quality=95, exif=exif)
    elif kind == "jpeg":
        picture.save(out, "JPEG", quality=90)
    elif kind == "palette":
        picture.quantize(64).save(out, "PNG")
    elif kind == "grey":
        picture.convert("L").save(out, "PNG")
    elif kind == "16-bit":
        Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(out, "PNG")
    elif kind == "alpha":
        picture.convert("RGBA").save(out, "PNG")
    else:
        picture.save(out, "PNG")
    return out.getvalue()


KINDS = ("exif", "jpeg", "palette", "grey", "16-bit", "alpha", "png")
SIZES = ((64, 96), (61, 83), (203, 301), (40, 150), (150, 33), (9, 7))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One test image of every kind in every size: shards, a manifest, and the files' bytes beside them."""
    root = tmp_path_factory.mktemp("same")
    rng = np.random.default_rng(3)
    pictures, answers = [], []
    for size in SIZES:
        for kind in KINDS:
            image, mask = tiny_project.scene(rng, max(size[0], 13), max(size[1], 13))
            image, mask = image[: size[0], : size[1]], mask[: size[0], : size[1]]
            name = f"{kind}-{size[0]}x{size[1]}"
            pictures.append((f"{name}.{'jpg' if kind in ('exif', 'jpeg') else 'png'}", encode(image, kind)))
            answers.append((f"{name}.png", label_maps.encode_png(mask)))
    home = root / "data/ingested"
    shards.write_tar(home / "images.tar", pictures)
    shards.write_tar(home / "masks.tar", answers)
    rows = []
    for (name, data), one, two in zip(
        pictures, shards.members(home / "images.tar"), shards.members(home / "masks.tar"), strict=True
    ):
        _, width, height = decode.probe(data)
        image_HWC = decode.decode(data, max_pixels=10**6)
        assert image_HWC.shape[:2] == (height, width)
        rows.append(
            manifest.Row(
                manifest.image_id(image_HWC), name, "test", "base", "g", width, height, "data/ingested/images.tar",
                one.offset, one.length, "data/ingested/masks.tar", two.offset, two.length, "0" * 16, "test",
            )
        )  # fmt: skip
        (root / "files").mkdir(exist_ok=True)
        (root / "files" / name).write_bytes(data)
    manifest.write(root / "data/split/manifest.parquet", rows)
    return root


@pytest.mark.slow
def test_the_same_files_get_the_same_answers_and_the_same_score(project: Path) -> None:
    exported = tiny_project.exported()
    opened = runtime.Runtime(
        bundle.open_bundle(exported / "models/exported"), provider="cpu", precision="fp32", threads=1
    )
    model, _ = segmenter.load(exported / "models/student/student.safetensors")
    theirs, same, pixels = np.zeros((4, 4), np.int64), 0, 0
    with chdir(project):
        rows = manifest.read(Path("data/split/manifest.parquet"))
        by_name = {row.name: row for row in rows}
        assert len(by_name) == len(KINDS) * len(SIZES)
        batches = inference.plan_batches(rows, tiny_project.INPUT, 4)
        how = evaluate.Counting(tiny_project.INPUT, classes=4, ignore=255, distance=2, max_pixels=10**6)
        scored = evaluate.score(model, batches, how)
        ours = np.sum([tally.confusion_KK for tally in scored.tallies], 0)
        for batch in inference.stream(batches, tiny_project.INPUT, 10**6, mask=True):
            labels, _ = inference.segment(model, batch, inference.device())
            for sample, label in zip(batch, labels, strict=True):
                label_HW = resize.restore(label, sample.fit)
                data = (project / "files" / sample.row.name).read_bytes()
                served_HW = opened.segment(decode.decode(data, max_pixels=10**6)).label_HW
                assert sample.truth_HW is not None
                assert label_HW.shape == served_HW.shape == sample.truth_HW.shape, sample.row.name
                theirs += metrics.confusion(sample.truth_HW, served_HW, 4, 255)
                same, pixels = same + int((label_HW == served_HW).sum()), pixels + label_HW.size
    assert same / pixels >= 0.9999
    assert 20 < scores.miou(ours) < 100  # neither blind nor perfect: a score that can move
    assert abs(scores.miou(ours) - scores.miou(theirs)) < 0.1


def test_another_resize_would_be_seen(project: Path) -> None:
    """The bar of the test above is sharp: nearest instead of antialiased bilinear moves the answers past it."""
    exported = tiny_project.exported()
    opened = runtime.Runtime(
        bundle.open_bundle(exported / "models/exported"), provider="cpu", precision="fp32", threads=1
    )
    data = (project / "files" / "png-203x301.png").read_bytes()
    image_HWC = decode.decode(data, max_pixels=10**6)
    plan = opened.bundle.fit(*image_HWC.shape[:2])
    small = Image.fromarray(image_HWC).resize((plan.scaled_width, plan.scaled_height), Image.Resampling.NEAREST)
    other = opened.segment(np.asarray(small)).label_HW
    right = opened.segment(image_HWC).scaled_label_hw
    assert (other != right).mean() > 0.001


def test_params_of_the_test_are_the_products_own() -> None:
    assert config.Input.model_validate(tiny_project.meta()["params"]["input"]) == tiny_project.INPUT
