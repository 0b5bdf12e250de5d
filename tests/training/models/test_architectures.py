"""Networks by name: features that decode to the logits, padding choices, frozen encoders, sizes."""

import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from timm.models.vision_transformer import _create_vision_transformer
from torch import nn

from export import onnx_graph
from pipeline.config import Model
from tests.support import tiny_settings
from training import predict
from training.engine import ema
from training.models import architectures, layers, segmenter

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
    model = segmenter.build(tiny_settings.model(**{**settings, **options}), 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    return model.eval()


def picture(model, rows=4, columns=6, batch=2):
    return torch.rand(batch, 3, rows * model.step, columns * model.step) * 255


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


def test_our_dpt_is_smps_where_smps_works(monkeypatch):
    """A patch of 16 on an even grid, prefix tokens ignored, the ViT's last norm taken away, positions resized without
    antialiasing as DINOv2 has it."""
    torch.manual_seed(0)
    plain = functools.partial(timm.layers.resample_abs_pos_embed, antialias=False)
    monkeypatch.setattr(timm.models.vision_transformer, "resample_abs_pos_embed", plain)
    ours = segmenter.build(tiny_settings.model(architecture="DPT", encoder="test_vit", weights=None), 3).eval()
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


@pytest.mark.parametrize(
    "encoder", ["eva02_tiny_patch14_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"]
)
def test_dpt_leaves_the_positions_of_other_vits_alone(encoder):
    with torch.inference_mode():
        net, step = architectures.Dpt(encoder, 3).eval(), 14 if "14" in encoder else 16
        image = torch.rand(1, 3, 3 * step, 5 * step)
        assert net.decode(net.encoder(image), image.shape[-2:]).shape == (1, 3, 3 * step, 5 * step)


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
    layers.use_asymmetric_padding(holder)
    total = [max((-(-n // 2) - 1) * 2 + kernel - n, 0) for n in (18, 12)]
    pads = [p for t in total for p in (t // 2, t - t // 2)]
    expected = F.conv2d(F.pad(image, pads), conv.weight, stride=2, groups=4)
    assert torch.equal(holder(image), expected)
    assert torch.allclose(symmetric, expected) == (kernel == 1)
    assert list(holder.state_dict()) == ["0.0.weight"]


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
        tiny_settings.model(**section)


@pytest.mark.parametrize(
    ("model", "step"),
    [({"architecture": "DPT", "encoder": "vit_small_patch14_dinov2"}, 14), ({"architecture": "DPT", "encoder": "test_vit"}, 16),
     ({"architecture": "DeepLabV3Plus", "output_stride": 8}, 8), ({"architecture": "FPN"}, 32),
     ({"architecture": "my_nets:Net", "weights": None}, 32)],
)  # fmt: skip
def test_the_step_that_settings_must_keep_to(model, step):
    assert tiny_settings.model(**model).step == step


@pytest.mark.slow
def test_dpt_exports_with_free_sizes_and_agrees():
    model = small("DPT")
    graph = onnx_graph.trace(model, model.step, {})
    for node in onnx.load_from_string(graph.data).graph.node:  # TensorRT refuses it, OpenVINO leaves it out
        assert not [a for a in node.attribute if a.name == "antialias" and a.i], node.name
    session = onnxruntime.InferenceSession(graph.data, providers=["CPUExecutionProvider"])
    deployed = onnx_graph.Deployed(model).eval()
    for batch, rows, columns in ((1, 1, 1), (1, 3, 5), (3, 2, 7), (2, 5, 5)):
        image = torch.randint(0, 256, (batch, 14 * rows, 14 * columns, 3), dtype=torch.uint8)
        with torch.inference_mode():
            label, confidence = (value.numpy() for value in deployed(image))
        got, sure = session.run(None, {"image": image.numpy()})
        assert (got == label).mean() > 0.999
        assert np.abs(sure.astype(int) - confidence.astype(int)).max() <= 1
