"""What callers are shown of a model."""

from typing import Any, Self

from pydantic import BaseModel

from export.bundle.manifest import ClassInfo, InputPolicy
from export.runtime.runtime import Runtime


class ModelAnswer(BaseModel):
    """The answer of GET /v1/model."""

    bundle: str
    name: str
    created: str
    method: str
    provider: str
    precision: str
    classes: list[ClassInfo]
    ignore: int
    input: InputPolicy
    metrics: dict[str, Any]
    data_hash: str
    split_hash: str
    test_hash: str
    commit: str

    @classmethod
    def of(cls, runtime: Runtime) -> Self:
        """What `runtime` serves."""
        manifest = runtime.bundle.manifest
        shared = {name: getattr(manifest, name) for name in cls.model_fields if hasattr(manifest, name)}
        return cls(bundle=manifest.id, provider=runtime.provider, precision=runtime.precision, **shared)


class ModelCard(BaseModel):
    """One model that is held in memory."""

    bundle: str
    name: str
    created: str
    method: str
    path: str
    provider: str
    precision: str
    classes: list[str]
    metrics: dict[str, Any]

    @classmethod
    def of(cls, runtime: Runtime, path: str, **more: Any) -> Self:
        """The card of `runtime`, whose bundle is shown to lie at `path`; `more` are a subclass's fields."""
        manifest = runtime.bundle.manifest
        return cls(
            bundle=manifest.id,
            name=manifest.name,
            created=manifest.created,
            method=manifest.method,
            path=path,
            provider=runtime.provider,
            precision=runtime.precision,
            classes=[item.name for item in manifest.classes],
            metrics=manifest.metrics,
            **more,
        )


class ShadowReport(BaseModel):
    """How far a shadow agrees with the model `against`: share of pixels, and by class intersection over union.

    Of the images offered to it, `scored` went through it, `dropped` found it busy, `failed` made it fail.
    """

    against: str | None
    images: int
    agreement: float | None
    agreement_by_class: dict[str, float]
    scored: int
    dropped: int
    failed: int


class ShadowCard(ShadowReport, ModelCard):
    """The shadow, and its report."""
