"""params.yaml as frozen pydantic models: it is complete, so no field has a default, and unknown keys are refused."""

from pipeline.config.data import Data, Ingest, Lists, Scale, Split
from pipeline.config.load import load, parse
from pipeline.config.network import Input, Model
from pipeline.config.overlay import merge, nested
from pipeline.config.params import Params
from pipeline.config.quality import Evaluate, Export, Gate, Parity, ParityLimits, Pool
from pipeline.config.section import ConfigError, Section
from pipeline.config.train import Train

__all__ = [
    "ConfigError", "Data", "Evaluate", "Export", "Gate", "Ingest", "Input", "Lists", "Model", "Params",
    "Parity", "ParityLimits", "Pool", "Scale", "Section", "Split", "Train", "load", "merge", "nested", "parse",
]  # fmt: skip
