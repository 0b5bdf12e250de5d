"""One table of the last run, read from the small reports that the stages left."""

from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline import paths
from pipeline.stage import Result
from pipeline.storage import atomic


def _interval(pair: list[float | None] | None) -> str:
    return "" if not pair or None in pair else f"[{pair[0]:.1f}, {pair[1]:.1f}]"


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _read(path: Path, stage: str) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there yet; run `dvc repro {stage}`")
    return dict(atomic.read_json(path))


def read(root: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What evaluate, parity and gate reported.

    Raises:
        FileNotFoundError: a report is missing; names the stage that writes it.
    """
    scores = _read(root / paths.SCORES, "evaluate")
    parity = _read(root / paths.PARITY, "parity")
    return scores, parity, _read(root / paths.GATE, "gate")


def table(scores: dict[str, Any], parity: dict[str, Any], gate: dict[str, Any]) -> Table:
    """Scores with intervals, parity and verdict."""
    result = Table(
        title=f"{scores['method']}, {scores['steps']} steps, {scores['test_images']} test images", title_justify="left"
    )
    result.add_column("")
    result.add_column("value", justify="right")
    result.add_column("95 % interval")
    result.add_row("mIoU (%)", _percent(scores["miou"]), _interval(scores.get("miou_ci")), style="bold")
    for name, one in scores["per_class"].items():
        result.add_row(f"  {name}", _percent(one["iou"]), _interval(one.get("ci")))
    result.add_row("boundary IoU (%)", _percent(scores.get("boundary_iou")), "")
    result.add_row("expected calibration error", _percent(scores.get("ece"), 3), "", end_section=True)
    agreement = parity["original"]["agreement"]
    result.add_row(
        "parity: ONNX agrees with torch (%)", _percent(100 * agreement, 3), "passed" if parity["passed"] else "FAILED"
    )
    result.add_row("gate", gate["verdict"], gate["reason"], end_section=True)
    return result


def places(root: Path) -> list[tuple[str, str]]:
    """(what, where) of the things a person wants next, only those that exist."""
    pointer = root / paths.CHAMPION
    champion = atomic.read_json(pointer)["bundle"] if pointer.exists() else "none yet: the gate has promoted nothing"
    files = (
        ("curves", paths.CURVES),
        ("pseudo-labels", paths.PSEUDO_LABELS),
        ("confusion, overlays", paths.EVALUATION),
        ("model card", paths.MODEL_CARD),
        ("what to label next", paths.LABEL_NEXT),
    )
    return [("champion bundle", champion), *((what, str(path)) for what, path in files if (root / path).exists())]


def run(root: Path) -> Result:
    """`marginalia report`: the table, the places, and how to serve. Raises FileNotFoundError as `read`."""
    scores, parity, gate = read(root)
    where = Table(show_header=False, box=None)
    for what, path in places(root):
        where.add_row(what, path)
    where.add_row("serve", "make serve")
    where.add_row(
        "ask",
        "curl --data-binary @image.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:3000/v1/segment -o mask.png",
    )
    record = {"scores": scores, "parity": parity, "gate": gate, "places": dict(places(root))}
    return Result((table(scores, parity, gate), where), record=record)
