"""What predict leaves: statistics against a slow loop, one forward pass, pre-labels, the pool's limits."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import config
from pipeline.imaging import resize
from pipeline.storage import manifest, predictions
from tests.support import tiny_project
from tests.support.command_line import marginalia
from training import inference, predict


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Params:
    monkeypatch.chdir(tmp_path)
    return tiny_project.write(tmp_path)


def slow_refined_margin(probability: np.ndarray) -> np.ndarray:
    """Eight neighbours, the best one per class, zero outside: the paper's default, pixel by pixel."""
    k, height, width = probability.shape
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            refined = []
            for c in range(k):
                near = [
                    probability[c, y + dy, x + dx]
                    for dy in (-1, 0, 1)
                    for dx in (-1, 0, 1)
                    if (dy or dx) and 0 <= y + dy < height and 0 <= x + dx < width
                ]
                p, n = probability[c, y, x], max(near)
                refined.append(p + n - p * n)
            first, second = sorted(refined)[:-3:-1]
            out[y, x] = first - second
    return out


def test_statistics_against_a_slow_loop() -> None:
    torch.manual_seed(0)
    plan = resize.plan(10, 13, long_side=64, stride=8)  # padded to 16 x 16
    logits, features = torch.randn(3, 16, 16, dtype=torch.float64) * 2, torch.randn(5, 4, 4)
    got = predict.statistics(logits, features, plan)
    probability = torch.softmax(logits, 0).numpy()
    sure = slow_refined_margin(probability)[:10, :13]
    inside = probability[:, :10, :13]
    label = inside.argmax(0)
    assert float(got.confidence) == pytest.approx(inside.max(0).mean(), abs=1e-6)
    assert float(got.margin) == pytest.approx(sure.mean(), abs=1e-6)
    assert float(got.entropy) == pytest.approx(-(inside * np.log(inside)).sum(0).mean() / np.log(3), abs=1e-6)
    counts, _ = np.histogram(sure, bins=predictions.MARGIN_BINS, range=(0, 1))
    np.testing.assert_allclose(got.margins.numpy(), counts / 130, atol=1e-9)
    for c in range(3):
        assert float(got.area[c]) == pytest.approx((label == c).mean())
        assert float(got.doubt[c]) == pytest.approx((1 - sure)[label == c].sum() / 130, abs=1e-6)
    # 10 of 16 rows and 13 of 16 columns touch 3 and 4 of the 4 feature cells.
    torch.testing.assert_close(got.embedding, features[:, :3, :4].mean((1, 2)))


def test_features_come_from_the_same_forward_pass() -> None:
    model, image = tiny_project.trained(), torch.rand(2, 3, 64, 96) * 255
    calls = []
    handle = model.net.encoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        logits, features = predict.with_features(model, image)
        handle.remove()
        assert len(calls) == 1
        torch.testing.assert_close(logits, model(image))
        torch.testing.assert_close(features, model.encode(image)[-1])
    assert not model.net.encoder._forward_hooks


def test_stage_writes_the_pool_and_pre_labels(project: config.Params) -> None:
    assert marginalia("stage", "predict") == 0
    seen = predictions.read_pool()
    assert sorted(set(zip(seen.split, seen.group, strict=True))) == [("labelled", "a"), ("unlabelled", "b")]
    assert len(seen.id) == 14
    assert list(seen.classes) == tiny_project.NAMES
    assert seen.embedding.shape[0] == 14
    np.testing.assert_allclose(seen.area.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(seen.doubt.sum(1), 1 - seen.margin, atol=1e-5)
    for values in (seen.confidence, seen.margin, seen.entropy):
        assert ((values >= 0) & (values <= 1)).all()
    model, rows = tiny_project.trained(), {r.id: r for r in manifest.read(Path("data/split/manifest.parquet"))}
    with tarfile.open(predictions.PRELABELS) as archive:
        members = archive.getmembers()
        assert len(members) == 8  # all unlabelled: fewer than the shortlist's limit
        for member in members:
            row = rows[member.name.removesuffix(".png")]
            assert row.split == "unlabelled"
            stream = archive.extractfile(member)
            assert stream is not None
            ids = np.array(Image.open(io.BytesIO(stream.read())))
            assert ids.shape == (row.height, row.width)
            sample = inference.read(row, tiny_project.INPUT, 10**6, mask=False)
            label, _ = inference.segment(model, [sample], torch.device("cpu"))
            assert (ids == resize.restore(label[0], sample.fit)).mean() > 0.999


def test_a_large_pool_is_sampled_but_labelled_images_stay(tmp_path: Path) -> None:
    rows = tiny_project.write_data(
        tmp_path, [("labelled", "base", "a", 3), ("unlabelled", "base", "b", 9), ("test", "base", "c", 1)]
    )
    chosen = predict.choose_rows(rows, 4)
    assert [r.split for r in chosen] == ["labelled"] * 3 + ["unlabelled"] * 4
    assert chosen == predict.choose_rows(rows, 4)
    assert [r for r in rows if r in chosen] == chosen  # in the manifest's order
    assert predict.choose_rows(rows, 9) == rows[:12]


def test_an_empty_pool_is_an_error_that_says_so(
    project: config.Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_project.write_data(tmp_path, [("test", "base", "c", 1)])
    assert marginalia("stage", "predict") == 1
    assert "neither labelled nor unlabelled" in capsys.readouterr().err
