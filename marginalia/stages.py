"""`marginalia stage NAME`: what dvc.yaml calls, a command for each stage there."""

from pathlib import Path
from typing import Annotated

import typer

from marginalia import other_code
from marginalia.command import PARAMS, Params, command
from pipeline import paths, stage
from pipeline.stage import Exit

app = typer.Typer(help="Run one stage of dvc.yaml, as `dvc repro` does.", no_args_is_help=True)


@app.callback()
def options() -> None:
    # Without a docstring, so that the group's own help stands.
    if told := other_code.warning(Path()):
        stage.warn(told)


@command(app)
def pull(params: Params = PARAMS) -> Exit:
    """The source as it came, one archive; demo frames are rendered here."""
    from pipeline.ingest import pull

    return stage.run("pull", pull.run, params=params)


@command(app)
def ingest(
    dump: Annotated[str, typer.Argument(help=f"a name in {paths.DUMP_REGISTRY}")], params: Params = PARAMS
) -> Exit:
    """One archive to verified shards."""
    from pipeline.ingest import check

    return stage.run("ingest", check.run, dump, params=params)


@command(app)
def index(params: Params = PARAMS) -> Exit:
    """All dumps in order of arrival, without exact and near duplicates."""
    from pipeline.ingest import deduplicate

    return stage.run("index", deduplicate.run, params=params)


@command(app)
def split(params: Params = PARAMS) -> Exit:
    """Labelled, unlabelled, val and test by whole groups; refuses leaks."""
    from pipeline.ingest import split

    return stage.run("split", split.run, params=params)


@command(app)
def screen(params: Params = PARAMS) -> Exit:
    """Later dumps against the training images, before training; exit code 3 if one is held back."""
    from pipeline.drift import stage as drift

    return stage.run("screen", drift.screen, params=params)


@command(app)
def train(params: Params = PARAMS) -> Exit:
    """Student weights, scores and history; exit code 75 after SIGTERM, and the same command resumes."""
    from training import train

    return stage.run("train", train.run, params=params)


@command(app, "train_report")
def train_report(params: Params = PARAMS) -> Exit:
    """Curves of the training, and what its pseudo-labels look like."""
    from training.reports import training

    return stage.run("train_report", training.run, params=params)


@command(app)
def evaluate(params: Params = PARAMS) -> Exit:
    """Scores on the test split, with intervals, pictures and the model card."""
    from training import evaluate

    return stage.run("evaluate", evaluate.run, params=params)


@command(app)
def export(params: Params = PARAMS) -> Exit:
    """The student as an ONNX graph and its cheaper variants: a draft that nothing serves."""
    from export import onnx

    return stage.run("export", onnx.run, params=params)


@command(app)
def parity(params: Params = PARAMS) -> Exit:
    """What answers as torch does and is worth its place becomes the bundle; exit code 3 if fp32 does not."""
    from export import parity

    return stage.run("parity", parity.run, params=params)


@command(app)
def gate(params: Params = PARAMS) -> Exit:
    """Challenger against champion; exit code 3 if the challenger is refused."""
    from pipeline.champions import gate

    return stage.run("gate", gate.stage, params=params)


@command(app)
def predict(params: Params = PARAMS) -> Exit:
    """Doubts, embeddings and pre-labels of the student over the pool."""
    from training import predict

    return stage.run("predict", predict.run, params=params)


@command(app)
def suspects(params: Params = PARAMS) -> Exit:
    """Masks that the student confidently contradicts, for a second look."""
    from training import suspects

    return stage.run("suspects", suspects.run, params=params)


@command(app)
def drift(params: Params = PARAMS) -> Exit:
    """Later dumps against the training images, by features and answers; exit code 3 if one is held back."""
    from pipeline.drift import stage as drift

    return stage.run("drift", drift.drift, params=params)


@command(app)
def rank(params: Params = PARAMS) -> Exit:
    """Which images to label next, packed with pre-labels for label tools."""
    from pipeline.labels import label_next

    return stage.run("rank", label_next.run, params=params)


@command(app, "data_report")
def data_report(params: Params = PARAMS) -> Exit:
    """What the data is, as one page that works offline."""
    from pipeline.reports import data_report

    return stage.run("data_report", data_report.run, params=params)
