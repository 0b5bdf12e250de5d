"""A user's own network by module and name: used as it is, and told what it gets wrong."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F

from tests.support import tiny_settings
from training import predict
from training.models import pretrained, segmenter

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
    model = segmenter.build(tiny_settings.model(architecture=f"my_nets:{name}", weights=None), 3).eval()
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
        "params": {"model": tiny_settings.model(architecture=f"my_nets:{name}", weights=None).model_dump()},
    }
    segmenter.save(own / "student.safetensors", model.state_dict(), meta)
    twin = copy.deepcopy(model)
    assert next(twin.net.encoder.parameters()) is next(twin.net.module.encoder.parameters())
    with torch.inference_mode():
        assert torch.equal(segmenter.load(own / "student.safetensors")[0](image), logits)


def test_a_users_own_encoder_can_be_frozen(own):
    model = segmenter.build(tiny_settings.model(architecture="my_nets:Plain", weights=None, freeze=True), 3).train()
    before = model.net.module.encoder[1].running_mean.clone()
    model(torch.rand(2, 3, 32, 32) * 255).sum().backward()
    assert torch.equal(model.net.module.encoder[1].running_mean, before)
    assert all(p.grad is None for p in model.net.module.encoder.parameters())
    assert model.net.module.head.weight.grad is not None
    with pytest.raises(
        pretrained.WeightsError, match=r"model\.freeze: my_nets:Headless has no submodule called `encoder`"
    ):
        segmenter.build(tiny_settings.model(architecture="my_nets:Headless", weights=None, freeze=True), 3)


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
    with pytest.raises(pretrained.WeightsError) as error:
        segmenter.build(tiny_settings.model(architecture=name, weights=None), 3)
    assert str(error.value).startswith("model.architecture: ")
    for part in words.split(" .* "):
        assert part in str(error.value)
