"""`marginalia predict`: a bundle over files, folders and archives. Needs no torch.

    OUT/NAME.png              class ids with the classes' palette
    OUT/overlays/NAME.jpg     the classes' colours over the image
    OUT/confidence/NAME.png   grey, 0..255 = 0..1 (--confidence)
    OUT/predictions.csv       a line an image; predictions.json: the same with the run's facts
    OUT/quarantine.json       what was not predicted, and why

Every file is whole or absent. The same inputs give the same names and the same pictures again, over the old ones;
files of an earlier run that this one does not write stay, and the two lists name only what this run did.
"""

import csv
import errno
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from export.bundle import bundle
from export.bundle.manifest import Manifest
from export.runtime import runtime
from export.tools import inputs as sources
from export.tools.inputs import Found, Quarantined
from export.tools.overlap import overlapped
from pipeline import console as progress
from pipeline.imaging import decode, label_maps, resize
from pipeline.storage import atomic

OVERLAY_ALPHA, JPEG_QUALITY = 0.5, 90  # what the service answers with
JPEG_SIDE = 65_500  # libjpeg's JPEG_MAX_DIMENSION
BYTES_PER_PIXEL = 14  # image, label, confidence and blend; Pillow keeps a copy of four bytes
LISTED = "predictions.json"
STRIP = 256  # rows that are blended and counted at a time: both need several times the memory of what they read
WORKERS = 4


@dataclass(frozen=True)
class Written:
    """One predicted image: its size in pixels, each class's share of the area, mean confidence 0..1, and the seconds
    spent on it from decoding to writing, waiting excluded."""

    file: str
    mask: str
    width: int
    height: int
    area: dict[str, float]
    confidence: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """What a run did; `seconds` from the first image's reading to the last one's writing."""

    output: Path
    bundle: str
    provider: str
    precision: str
    written: list[Written]
    quarantined: list[Quarantined]
    seconds: float


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


def targets(output: Path, name: str, *, overlay: bool, confidence: bool) -> dict[str, Path]:
    """The files of an image called `name`, by what they show: "mask", "overlay", "confidence"."""
    found = {"mask": output / f"{name}.png"}
    if overlay:
        found["overlay"] = output / "overlays" / f"{name}.jpg"
    if confidence:
        found["confidence"] = output / "confidence" / f"{name}.png"
    return found


def predict(
    folder: Path,
    inputs: Sequence[Path],
    output: Path,
    *,
    provider: runtime.Provider = "auto",
    precision: runtime.Precision = "auto",
    threads: int | None = None,
    overlay: bool = True,
    confidence: bool = False,
    console: Console | None = None,
) -> Result:
    """Segment every image in `inputs` with the bundle in `folder` and write the answers below `output`.

    Raises:
        bundle.BundleError: the bundle must not be run.
        runtime.ProviderError: the provider or precision asked for by name is not to be had here.
        sources.SourceError: an input is missing or holds no image, or the output would be read as input.
        OSError: the output cannot be written.
    """
    output = output.resolve()
    _check_output(output, folder.resolve())
    places = partial(targets, output, overlay=overlay, confidence=confidence)
    count, skip = sources.survey(inputs, lambda name: list(places(name).values()))
    opened = runtime.Runtime(bundle.open_bundle(folder), provider=provider, precision=precision, threads=threads)
    opened.warm_up()
    # The lists of an earlier run end here: whatever stops this one, they never describe pictures that it has replaced.
    names = [item.name for item in opened.bundle.manifest.classes]
    facts = opened.bundle.manifest.id, opened.provider, opened.precision
    _write_lists(Result(output, *facts, [], [], 0.0), names)
    written: list[Written] = []
    refused: list[Quarantined] = []
    started = time.perf_counter()
    steps = overlapped(
        _load(sources.walk(inputs, skip)),
        partial(_prepare, opened.bundle),
        partial(_run, opened),
        partial(_finish, manifest=opened.bundle.manifest, places=places, output=output),
        cost=lambda item: 0 if isinstance(item, Quarantined) else len(item.data) + BYTES_PER_PIXEL * item.pixels,
        workers=WORKERS,
    )
    with progress.bar("predict", count + len(skip), console) as bar:
        for item in steps:
            if isinstance(item, Quarantined):
                refused.append(item)
            else:
                written.append(item)
            bar.advance()
    seconds = time.perf_counter() - started
    result = Result(output, *facts, written, refused, seconds)
    _write_lists(result, names)
    return result


def _check_output(output: Path, folder: Path) -> None:
    """Refuse to write beside files that are not ours (a mask beside its photograph has our very name) or into a bundle."""
    if output.is_relative_to(folder):
        raise sources.SourceError(
            f"{output}: lies in the bundle, which may hold nothing else; choose another output folder"
        )
    if output.exists() and not output.is_dir():
        raise sources.SourceError(f"{output}: is a file; name a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / LISTED).exists():
        raise sources.SourceError(
            f"{output}: holds files that predict did not write and might replace; choose a new or empty output folder"
        )


def _load(found: Iterator[Found | Quarantined]) -> Iterator[_Loaded | Quarantined]:
    """The bytes, and from the header what the image will cost."""
    for item in found:
        if isinstance(item, Quarantined):
            yield item
            continue
        try:
            data = item.load()
            _, width, height = decode.probe(data)
            yield _Loaded(item, data, width * height)
        except decode.Refused as error:
            yield Quarantined(item.file, error.code, str(error))


def _prepare(opened: bundle.Bundle, loaded: _Loaded | Quarantined) -> _Prepared | Quarantined:
    if isinstance(loaded, Quarantined):
        return loaded
    started = time.perf_counter()
    try:
        image_HWC = decode.decode(loaded.data, max_pixels=sources.MAX_PIXELS)
    except decode.Refused as error:
        return Quarantined(loaded.found.file, error.code, str(error))
    plan = opened.fit(*image_HWC.shape[:2])
    input_HWC = resize.apply(image_HWC, plan)
    return _Prepared(loaded.found, image_HWC, plan, input_HWC, time.perf_counter() - started)


def _run(opened: runtime.Runtime, item: _Prepared | Quarantined) -> _Answered | Quarantined:
    """`Runtime.segment` without its first and last step, which are done beside it."""
    if isinstance(item, Quarantined):
        return item
    started = time.perf_counter()
    try:
        label_NHW, confidence_NHW = opened.run(item.input_HWC[None])
    except Exception as error:  # the engines' exceptions share no base class; the other images may still go through
        return Quarantined(
            item.found.file, "runtime", f"the model failed on it ({decode.short(error)}); try another provider"
        )
    return _Answered(item, label_NHW[0], confidence_NHW[0], item.seconds + time.perf_counter() - started)


def _finish(
    item: _Answered | Quarantined, manifest: Manifest, places: Callable[[str], dict[str, Path]], output: Path
) -> Written | Quarantined:
    if isinstance(item, Quarantined):
        return item
    file, plan = item.prepared.found.file, item.prepared.plan
    started = time.perf_counter()
    label_HW, confidence_HW = resize.restore(item.label_hw, plan), resize.restore(item.confidence_hw, plan)
    paths = places(item.prepared.found.name)
    if "overlay" in paths and max(label_HW.shape) > JPEG_SIDE:
        reason = f"longer than the {JPEG_SIDE} pixels that a JPEG can have; use --no-overlay"
        return Quarantined(file, "too-long-for-overlay", reason)
    for kind, path in paths.items():
        if kind == "mask":
            data = label_maps.encode_png(label_HW, manifest.palette)
        elif kind == "overlay":
            data = _overlay(item.prepared.image_HWC, label_HW, manifest)
        else:
            data = label_maps.encode_png(confidence_HW)
        try:
            atomic.write_bytes(path, data)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return Quarantined(file, "name-too-long", "its name makes no file name here; rename it")
    pixels = np.sum([np.bincount(label_HW[rows].ravel(), minlength=256) for rows in _strips(len(label_HW))], axis=0)
    return Written(
        file=file,
        mask=paths["mask"].relative_to(output).as_posix(),
        width=label_HW.shape[1],
        height=label_HW.shape[0],
        area={known.name: float(pixels[known.id] / label_HW.size) for known in manifest.classes},
        confidence=float(confidence_HW.mean() / 255),
        seconds=item.seconds + time.perf_counter() - started,
    )


def _strips(height: int) -> list[slice]:
    return [slice(top, top + STRIP) for top in range(0, height, STRIP)]


def _overlay(image_HWC: NDArray[np.uint8], label_HW: NDArray[np.uint8], manifest: Manifest) -> bytes:
    blended_HWC = np.empty_like(image_HWC)
    for rows in _strips(len(image_HWC)):
        blended_HWC[rows] = label_maps.overlay(image_HWC[rows], label_HW[rows], manifest.palette, OVERLAY_ALPHA)
    buffer = io.BytesIO()
    Image.fromarray(blended_HWC).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _write_lists(result: Result, classes: Sequence[str]) -> None:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "mask", "width", "height", *(f"area {name}" for name in classes), "confidence", "seconds"])
    for item in result.written:
        areas = (f"{item.area[name]:.6f}" for name in classes)
        rows.writerow(
            [item.file, item.mask, item.width, item.height, *areas, f"{item.confidence:.4f}", f"{item.seconds:.4f}"]
        )
    atomic.write_text(result.output / "predictions.csv", text.getvalue())
    atomic.write_json(result.output / LISTED, _facts(result))
    atomic.write_json(result.output / "quarantine.json", [item._asdict() for item in result.quarantined])


def _facts(result: Result) -> dict[str, Any]:
    return {
        "bundle": result.bundle,
        "provider": result.provider,
        "precision": result.precision,
        "seconds": result.seconds,
        "images": [asdict(item) for item in result.written],
    }


def record(result: Result) -> dict[str, Any]:
    """The run as plain values: what LISTED says, and what was quarantined."""
    return _facts(result) | {"quarantined": [item._asdict() for item in result.quarantined]}


def class_areas(written: Sequence[Written]) -> dict[str, float]:
    """Each class's share of all pixels of all images."""
    total = sum(item.width * item.height for item in written)
    names = written[0].area if written else {}
    return {name: sum(item.area[name] * item.width * item.height for item in written) / total for name in names}


def shown(result: Result, most: int = 20) -> list[Table | str]:
    """One table of the run, and after it what was quarantined (the first `most`)."""
    table = Table(title=f"predictions in {escape(str(result.output))}", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("images", str(len(result.written)))
    table.add_row("quarantined", str(len(result.quarantined)), style="yellow" if result.quarantined else None)
    table.add_row("images/s", f"{len(result.written) / result.seconds:.1f}", end_section=True)
    for name, share in class_areas(result.written).items():
        table.add_row(escape(name), f"{share:.1%}")
    table.add_section()
    for name, value in (("provider", result.provider), ("precision", result.precision), ("bundle", result.bundle)):
        table.add_row(name, value)
    lines = [f"{item.file}: {item.reason}" for item in result.quarantined[:most]]
    if (more := len(result.quarantined) - most) > 0:
        lines.append(f"and {more} more in {result.output / 'quarantine.json'}")
    return [table, *lines]
