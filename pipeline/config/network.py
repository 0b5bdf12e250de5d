"""Sections `model` and `input`: the network, and how an image of any size reaches it."""

import difflib
import re
from typing import ClassVar, Literal

from pydantic import field_validator, model_validator

from pipeline.config.section import Positive, Section


class Model(Section):
    """architecture: a name of ARCHITECTURES, or `some.module:Name` for the user's own network in the project folder."""

    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("DeepLabV3Plus", "FPN", "Unet", "Segformer", "DPT")

    architecture: str
    encoder: str
    weights: str | None
    freeze: bool
    padding: Literal["auto", "symmetric", "asymmetric"]
    output_stride: Literal[8, 16]

    @field_validator("architecture")
    @classmethod
    def _is_known(cls, value: str) -> str:
        dotted, colon, name = value.partition(":")
        if colon and all(part.isidentifier() for part in (*dotted.split("."), name)):
            return value

        if value not in cls.ARCHITECTURES:
            near = difflib.get_close_matches(value, cls.ARCHITECTURES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"no architecture {value!r}; {hint}choose {', '.join(cls.ARCHITECTURES)}, or some.module:Name for a "
                "network of your own"
            )
        return value

    @model_validator(mode="after")
    def _own_network_brings_its_weights(self) -> "Model":
        if ":" in self.architecture and self.weights is not None:
            raise ValueError(
                f"weights {self.weights!r}: {self.architecture} loads its own weights where it wants some; set weights: null"
            )
        return self

    @property
    def step(self) -> int:
        """What both sides of every image must be multiples of: DeepLab's output stride, a ViT's patch, else 32."""
        if self.architecture == "DeepLabV3Plus":
            return self.output_stride
        if self.architecture == "DPT":
            patch = re.search(r"patch(\d+)", self.encoder)
            return int(patch[1]) if patch else 16
        return 32


class Input(Section):
    """How an image of any size reaches the network; the same in training, evaluation and serving."""

    long_side: Positive
    stride: Positive
