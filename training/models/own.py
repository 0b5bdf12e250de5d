"""The user's own network from the project folder: found by `some.module:Name`, checked once, used as it is."""

import difflib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.models.layers import resize
from training.models.pretrained import WeightsError


class EncoderHook(nn.Module):
    """Stands in a user's network where others have their encoder: a hook on it hears the features (the logits, where
    there are none), and its parameters are those of the user's `encoder`, if there is one. Registers nothing twice."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["of"] = module

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        encoder = getattr(self.of, "encoder", None)
        return encoder.parameters(recurse) if isinstance(encoder, nn.Module) else iter(())

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return features


class OwnNetwork(nn.Module):
    """A user's network: normalised image_BCHW -> logits_BKhw; perhaps with encode and decode of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.encoder = module, EncoderHook(module)
        self.has_features = all(callable(getattr(module, name, None)) for name in ("encode", "decode"))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.module(image_BCHW)
        self.encoder([logits])
        return logits

    def encode(self, image_BCHW: Tensor) -> list[Tensor]:
        module: Any = self.module
        features: list[Tensor] = self.encoder(module.encode(image_BCHW))
        return features

    def decode(self, features: list[Tensor], size: Sequence[int]) -> Tensor:
        module: Any = self.module
        return resize(module.decode(features, size), size)


def _own_callable(architecture: str) -> Any:
    """The object that `some.module:Name` names. Only modules of the project folder: a file of weights names one too."""
    dotted, _, name = architecture.partition(":")
    folder = Path.cwd()
    importlib.invalidate_caches()
    if PathFinder.find_spec(dotted.partition(".")[0], [str(folder)]) is None:
        raise WeightsError(
            f"model.architecture: there is no module {dotted!r} in the project folder {folder}; put the file there, or "
            "import an installed package's network into one"
        )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # stays: the network may import more when it runs
    try:
        module = importlib.import_module(dotted)
    except Exception as error:
        raise WeightsError(
            f"model.architecture: {dotted!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).resolve().is_relative_to(folder.resolve()):
        raise WeightsError(
            f"model.architecture: {dotted!r} is {file or 'built in'}, not the project folder's; rename your module"
        )
    if not callable(found := getattr(module, name, None)):
        near = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise WeightsError(f"model.architecture: {file} has no callable {name!r}{hint}")
    return found


def load_own(architecture: str, n_classes: int) -> tuple[OwnNetwork, int]:
    """A user's network after one tiny forward pass, and the channels of its deepest feature (0: it shows none)."""
    make = _own_callable(architecture)
    say = f"model.architecture: {architecture}"
    try:
        module = make(n_classes)
    except Exception as error:
        raise WeightsError(
            f"{say}: calling it with {n_classes} classes raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise WeightsError(f"{say} returned a {type(module).__name__}; it must take n_classes and return an nn.Module")
    own, size = OwnNetwork(module).eval(), (64, 96)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))

    def attempt(what: str, call: Callable[[], Any]) -> Any:
        try:
            with torch.no_grad():
                return call()
        except Exception as error:
            raise WeightsError(
                f"{say}: {what} of a 1 x 3 x 64 x 96 image raised {type(error).__name__}: {error}"
            ) from error

    logits = attempt("forward", lambda: own(image))
    if not isinstance(logits, Tensor):
        raise WeightsError(f"{say}: forward returned a {type(logits).__name__}; it must return logits_BKHW, a tensor")
    if logits.ndim != 4 or logits.shape[:2] != (1, n_classes) or not logits.is_floating_point():
        raise WeightsError(
            f"{say}: forward returned {logits.dtype} of shape {tuple(logits.shape)} for a 1 x 3 x 64 x 96 image; it must "
            f"return floating-point logits of shape 1 x {n_classes} x h x w, one channel for each of the {n_classes} classes"
        )
    if n_classes > 1 and (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones(()), atol=1e-3):
        raise WeightsError(f"{say}: forward returned probabilities; leave the softmax out, the loss has its own")
    channels = 0
    if own.has_features:
        features = attempt("encode", lambda: own.encode(image))
        if not isinstance(features, list) or not all(isinstance(f, Tensor) and f.ndim == 4 for f in features):
            raise WeightsError(f"{say}: encode must return a list of B x C x h x w tensors, shallow to deep")
        again = attempt("decode", lambda: own.decode(features, size))
        if not torch.equal(again, resize(logits, size)):
            raise WeightsError(f"{say}: decode(encode(image), (H, W)) must give what forward(image) gives, bit for bit")
        channels = features[-1].shape[1]
    return own.train(), channels
