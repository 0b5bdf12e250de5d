"""Sections `data`, `ingest`, `scale` and `split`: from the user's files to labelled, unlabelled, val and test."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Positive, Section, Share


class Lists(Section):
    """Id lists: files in the source folder, relative to the project, or absolute; each may be null."""

    labelled: str | None
    unlabelled: str | None
    val: str | None
    test: str | None


class Data(Section):
    """`annotations`: the label file or files of a format that keeps them apart from the images, relative to `path`."""

    source: Literal["demo", "folder", "voc", "cityscapes", "coco", "labelme", "geotiff", "cvat", "labelstudio"]
    path: str
    classes: str | None
    lists: Lists
    group: str | None
    annotations: str | None
    masks: Literal["auto", "ids", "colours", "binary"]  # of folder: what a mask's pixels mean
    unannotated: Literal["ignore", "background"]  # pixels in no polygon or segment
    no_shapes: Literal["unlabelled", "background"]  # an image whose labels hold no shape
    cityscapes_ids: Literal["auto", "labelIds", "trainIds"]
    tile: Annotated[int, Field(ge=64, le=8192)]  # of geotiff: pixels a side
    missing_classes: Literal["stop", "allow"]  # a class of the class file that no mask holds

    @model_validator(mode="after")
    def _background_is_one(self) -> "Data":
        if self.no_shapes == "background" and self.unannotated != "background":
            raise ValueError(
                "no_shapes: background says that pixels in no shape are background: set unannotated: background too"
            )
        return self


class Ingest(Section):
    """What is quarantined or refused, and what counts as a copy."""

    max_pixels: Positive
    max_file_mb: Positive
    shard_mb: Positive
    near_duplicate_bits: Annotated[int, Field(ge=0, le=16)] | None
    near_duplicate_cap: Positive
    dump_max_gb: Annotated[float, Field(gt=0)]
    dump_max_files: Positive
    dump_max_ratio: Positive


class Scale(Section):
    """Who looks at the images of an archive: processes or threads here, or an engine that may run on a cluster."""

    backend: Literal["loky", "threading", "ray", "dask"]
    workers: Positive


class Split(Section):
    """Shares of groups that become val and test, where no list says so."""

    seed: int
    val: Share
    test: Share
    labelled: Positive | None

    @model_validator(mode="after")
    def _leaves_something(self) -> "Split":
        if self.val + self.test >= 1:
            raise ValueError(
                f"val {self.val} and test {self.test} leave nothing to train on: together they must stay below 1"
            )
        return self
