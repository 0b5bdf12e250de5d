"""All of params.yaml."""

from pydantic import model_validator

from pipeline.config.data import Data, Ingest, Scale, Split
from pipeline.config.network import Input, Model
from pipeline.config.quality import Evaluate, Export, Gate, Parity, Pool
from pipeline.config.section import Section
from pipeline.config.train import Train


class Params(Section):
    launch: str  # starts training: "torchrun --nproc-per-node 4" trains on four cards
    data: Data
    ingest: Ingest
    scale: Scale
    split: Split
    model: Model
    input: Input
    train: Train
    evaluate: Evaluate
    export: Export
    parity: Parity
    gate: Gate
    pool: Pool

    @model_validator(mode="after")
    def _sizes_fit_the_network(self) -> "Params":
        step = self.model.step
        for key, value in (("input.stride", self.input.stride), *(("train.crop", side) for side in self.train.crop)):
            if value % step:
                raise ValueError(f"{key}: {value} is not a multiple of {step}, which {self.model.architecture} needs")
        return self
