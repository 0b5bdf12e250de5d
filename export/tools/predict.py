"""`marginalia predict`: a bundle over files, folders and archives (`inputs`) into pictures and lists (`predictions`).

Needs no torch. Every file is whole or absent. The same inputs give the same names and the same pictures again, over the
old ones; files of an earlier run that this one does not write stay, and the two lists name only what this run did.
"""

import errno
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.bundle import bundle
from export.runtime import runtime
from export.tools import inputs as sources
from export.tools import predictions
from export.tools.inputs import Found, Quarantined
from export.tools.overlap import Steps, run_overlapped
from export.tools.predictions import JPEG_SIDE, Layout, Prediction, PredictionRun
from pipeline import console as progress
from pipeline.imaging import decode, resize
from pipeline.storage import atomic

BYTES_PER_PIXEL = 14  # image, label, confidence and blend; Pillow keeps a copy of four bytes
WORKERS = 4


@dataclass(frozen=True)
class Options:
    """What runs (`threads` of the network; None: all cores), and what is drawn beside the masks."""

    provider: runtime.Provider = "auto"
    precision: runtime.Precision = "auto"
    threads: int | None = None
    overlay: bool = True
    confidence: bool = False


DEFAULTS = Options()


class Rejected(Exception):
    """An image that cannot be predicted; the others go on."""

    def __init__(self, file: str, code: str, reason: str) -> None:
        super().__init__(reason)
        self.quarantined = Quarantined(file, code, reason)


@contextmanager
def _rejecting(file: str) -> Iterator[None]:
    """The decoder's refusals, with the name of the file."""
    try:
        yield
    except decode.Refused as error:
        raise Rejected(file, error.code, str(error)) from error


@dataclass(frozen=True)
class _Loaded:
    found: Found
    data: bytes
    pixels: int


@dataclass(frozen=True)
class _Prepared:
    found: Found
    image_HWC: NDArray[np.uint8]
    plan: resize.Fit
    input_HWC: NDArray[np.uint8]
    seconds: float


@dataclass(frozen=True)
class _Answered:
    prepared: _Prepared
    label_hw: NDArray[np.uint8]
    confidence_hw: NDArray[np.uint8]
    seconds: float


class _Predictor:
    """`Runtime.segment` in steps that overlap, from a file's bytes to its pictures. Each raises Rejected."""

    def __init__(self, opened: runtime.Runtime, layout: Layout) -> None:
        self.runtime = opened
        self.manifest = opened.bundle.manifest
        self.layout = layout

    def steps(self) -> Steps[Found | Quarantined, _Loaded, _Prepared, _Answered, Prediction]:
        return Steps(self.load, self.cost, self.prepare, self.run, self.finish)

    def load(self, found: Found | Quarantined) -> _Loaded:
        """The bytes, and from the header what the image will cost."""
        if isinstance(found, Quarantined):
            raise Rejected(*found)
        with _rejecting(found.file):
            data = found.load()
            _, width, height = decode.probe(data)
        return _Loaded(found, data, width * height)

    def cost(self, loaded: _Loaded) -> int:
        return len(loaded.data) + BYTES_PER_PIXEL * loaded.pixels

    def prepare(self, loaded: _Loaded) -> _Prepared:
        started = time.perf_counter()
        with _rejecting(loaded.found.file):
            image_HWC = decode.decode(loaded.data, max_pixels=sources.MAX_PIXELS)
        plan = self.runtime.bundle.fit(*image_HWC.shape[:2])
        input_HWC = resize.apply(image_HWC, plan)
        return _Prepared(loaded.found, image_HWC, plan, input_HWC, time.perf_counter() - started)

    def run(self, prepared: _Prepared) -> _Answered:
        started = time.perf_counter()
        try:
            label_NHW, confidence_NHW = self.runtime.run(prepared.input_HWC[None])
        except Exception as error:  # the engines' exceptions share no base class; the other images may still go through
            reason = f"the model failed on it ({decode.short(error)}); try another provider"
            raise Rejected(prepared.found.file, "runtime", reason) from error
        seconds = prepared.seconds + time.perf_counter() - started
        return _Answered(prepared, label_NHW[0], confidence_NHW[0], seconds)

    def finish(self, answered: _Answered) -> Prediction:
        started = time.perf_counter()
        file, plan = answered.prepared.found.file, answered.prepared.plan
        label_HW = resize.restore(answered.label_hw, plan)
        confidence_HW = resize.restore(answered.confidence_hw, plan)

        paths = self.layout.paths(answered.prepared.found.name)
        if "overlay" in paths and max(label_HW.shape) > JPEG_SIDE:
            reason = f"longer than the {JPEG_SIDE} pixels that a JPEG can have; use --no-overlay"
            raise Rejected(file, "too-long-for-overlay", reason)
        for kind, path in paths.items():
            data = predictions.encode(kind, answered.prepared.image_HWC, label_HW, confidence_HW, self.manifest)
            _write(path, data, file)

        return Prediction(
            file=file,
            mask=paths["mask"].relative_to(self.layout.output).as_posix(),
            width=label_HW.shape[1],
            height=label_HW.shape[0],
            area=predictions.class_shares(label_HW, self.manifest),
            confidence=float(confidence_HW.mean() / 255),
            seconds=answered.seconds + time.perf_counter() - started,
        )


def _write(path: Path, data: bytes, file: str) -> None:
    """Raises Rejected where the file system takes no such name, and OSError."""
    try:
        atomic.write_bytes(path, data)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise Rejected(file, "name-too-long", "its name makes no file name here; rename it") from error


def predict(folder: Path, inputs: Sequence[Path], output: Path, options: Options = DEFAULTS) -> PredictionRun:
    """Segment every image in `inputs` with the bundle in `folder` and write the answers below `output`.

    Raises:
        bundle.BundleError: the bundle must not be run.
        runtime.ProviderError: the provider or precision asked for by name is not to be had here.
        sources.SourceError: an input is missing or holds no image, or the output would be read as input.
        OSError: the output cannot be written.
    """
    layout = Layout(output.resolve(), options.overlay, options.confidence)
    layout.check(folder.resolve())
    count, skip = sources.survey(inputs, lambda name: list(layout.paths(name).values()))
    opened = runtime.Runtime(
        bundle.open_bundle(folder), provider=options.provider, precision=options.precision, threads=options.threads
    )
    opened.warm_up()

    # The lists of an earlier run end here: whatever stops this one, they never describe pictures that it has replaced.
    manifest = opened.bundle.manifest
    classes = [item.name for item in manifest.classes]
    nothing = PredictionRun(
        bundle=manifest.id, provider=opened.provider, precision=opened.precision, images=(), quarantined=(), seconds=0.0
    )
    predictions.write_lists(layout.output, nothing, classes)

    images: list[Prediction] = []
    quarantined: list[Quarantined] = []
    started = time.perf_counter()
    outcomes = run_overlapped(sources.walk(inputs, skip), _Predictor(opened, layout).steps(), workers=WORKERS)
    with closing(outcomes), progress.bar("predict", count + len(skip)) as bar:
        for outcome in outcomes:
            try:
                images.append(outcome.result())
            except Rejected as error:
                quarantined.append(error.quarantined)
            bar.advance()

    seconds = time.perf_counter() - started
    run = nothing.model_copy(update={"images": tuple(images), "quarantined": tuple(quarantined), "seconds": seconds})
    predictions.write_lists(layout.output, run, classes)
    return run
