"""How far is each later dump from what the model was trained on? A calibrated two-sample test (`pipeline.drift.two_sample`).

Twice in the flow. Before training (`--screen`, reports/screen.json): image descriptors that need no network
(`pipeline.storage.predictions.descriptor`), so that a night dump in a day set is flagged before it can do harm. After predict
(reports/drift.json): the student's features, and beside them its answers (`pipeline.drift.predictions`). A normal dump
is flagged with probability `pool.drift_p` at most: where there are two looks, each has half of it.

Besides the numbers: reports/screen.png and reports/drift.png, the points on their main axes; reports/screen/unusual.jpg
and reports/drift/unusual.jpg, the images of the drifted dumps (of all later ones, if none is) that lie farthest out.

`reports/screen.pass` lists the dumps that may train, one a line, and nothing else: training depends on that, not
on the numbers beside it.

`pool.policy` says what a drifted dump leads to: `warn` prints a warning; `hold` also fails the stage, which stops what
depends on it (exit code 3); `train` notes it in the report alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from pipeline import config, paths
from pipeline import console as progress
from pipeline.drift import energy_distance, plots, two_sample
from pipeline.drift import predictions as shifts
from pipeline.drift.records import DriftReport, DumpDrift, Finding
from pipeline.drift.two_sample import BASE, Cloud, compare
from pipeline.stage import Exit, Result
from pipeline.storage import atomic, manifest
from pipeline.storage import predictions as pool
from pipeline.storage.predictions import PoolError

LOOKED = 5000  # images of the pool among which the unusual ones are sought


class Look(NamedTuple):
    """What is compared: the points, their rows in the manifest, and what the network answered (not before training)."""

    points: Cloud
    rows: list[manifest.Row]
    seen: pool.PredictionPool | None


def before(rows: Sequence[manifest.Row], max_pixels: int) -> Look:
    """Descriptors of the images that can enter the test (a seeded sample of each side); nothing is read without
    later dumps.
    """
    rows = [row for row in rows if row.split in ("labelled", "unlabelled")]
    columns = [np.array([getattr(r, key) or "" for r in rows], dtype=np.str_) for key in ("dump", "group", "split")]
    whole = Cloud(np.zeros((len(rows), pool.DESCRIPTOR)), *columns)
    dumps = whole.later_dumps()
    rng = np.random.default_rng(two_sample.SEED)
    masks = [whole.reference, *((whole.dump == d) & ~whole.reference for d in dumps)] if dumps else []
    kept = [int(i) for mask in masks for i in two_sample.take(np.flatnonzero(mask), rng)]
    features = []
    with progress.bar("look at images", len(kept)) as bar:
        for i in kept:
            features.append(pool.descriptor(manifest.open_image(rows[i], max_pixels)))
            bar.advance()
    feature_ND = np.array(features, dtype=np.float64).reshape(len(kept), pool.DESCRIPTOR)
    return Look(Cloud(feature_ND, *(c[kept] for c in columns)), [rows[i] for i in kept], None)


def after(seen: pool.PredictionPool, rows: Sequence[manifest.Row]) -> Look:
    """The student's features of the whole pool.

    Raises:
        PoolError: the pool knows an image that the manifest does not.
    """
    by_id = {row.id: row for row in rows}
    if unknown := [str(name) for id_, name in zip(seen.id, seen.name, strict=True) if str(id_) not in by_id]:
        raise PoolError(
            f"{pool.FILE}: image {unknown[0]!r} is not in {paths.SPLIT_MANIFEST}; run the predict stage again"
        )
    points = Cloud(seen.embedding, seen.dump, seen.group, seen.split)
    return Look(points, [by_id[str(id_)] for id_ in seen.id], seen)


def verdicts(look: Look, settings: config.Pool) -> dict[str, dict[str, Finding]]:
    """Dump -> source ("features" or "descriptor", "answers") -> finding; together they err at `drift_p` at most."""
    clouds = {"features" if look.seen else "descriptor": look.points}
    if look.seen is not None:
        clouds["answers"] = shifts.answers(look.seen)
    share = settings.drift_p / len(clouds)
    count = max(settings.permutations, energy_distance.fewest(share)) if len(clouds) > 1 else settings.permutations
    each = settings.model_copy(update={"drift_p": share, "permutations": count})
    dumps = look.points.later_dumps()
    return {dump: {source: compare(points, dump, each) for source, points in clouds.items()} for dump in dumps}


def report(look: Look, found: dict[str, dict[str, Finding]], settings: config.Pool) -> DriftReport:
    """What reports/screen.json or reports/drift.json says. A dump's own numbers are those of the first source."""
    drifted = [dump for dump, by_source in found.items() if any(f.drifted for f in by_source.values())]
    return DriftReport(
        space="student features" if look.seen else "image descriptor",
        drift_p=settings.drift_p,
        permutations=settings.permutations,
        policy=settings.policy,
        dumps={dump: _dump_drift(look, dump, by_source, settings) for dump, by_source in found.items()},
        drifted=drifted,
        held=drifted if settings.policy == "hold" else [],
    )


def _dump_drift(look: Look, dump: str, by_source: dict[str, Finding], settings: config.Pool) -> DumpDrift:
    first, *others = by_source.items()
    values = dict(first[1]) | {
        "drifted": any(finding.drifted for finding in by_source.values()),
        "sources": {first[0]: first[1].drifted, **dict(others)},
    }
    if look.seen is not None:
        values["shifts"] = shifts.describe(look.seen, dump, settings)
    return DumpDrift(**values)


def show_unusual(look: Look, said: DriftReport, max_pixels: int, path: Path) -> None:
    """The page of the farthest images of the drifted dumps, or of all later ones."""
    dumps = said.drifted or list(said.dumps)
    rng = np.random.default_rng(two_sample.SEED)
    there = np.flatnonzero(np.isin(look.points.dump, dumps) & ~look.points.reference)
    there = there if len(there) <= LOOKED else np.sort(rng.choice(there, LOOKED, replace=False))
    rows = np.concatenate([two_sample.take(np.flatnonzero(look.points.reference), rng), there])
    points = look.points
    some = Cloud(points.feature_ND[rows], points.dump[rows], points.group[rows], points.split[rows])
    what = "drifted: " if said.drifted else "like the rest: "
    title = f"farthest from the reference, {said.space}; {what}{', '.join(dumps)}" if dumps else "no later dump"
    plots.page(
        plots.farthest(some, dumps),
        title,
        lambda i: look.rows[rows[i]].name,
        lambda i: manifest.open_image(look.rows[rows[i]], max_pixels),
        path,
    )


def screen(params: config.Params) -> Result:
    """The stage before training: images of later dumps -> reports/screen.*, and which dumps may train: screen.pass."""
    look = before(manifest.read(paths.SPLIT_MANIFEST), params.ingest.max_pixels)
    found = verdicts(look, params.pool)
    said = _write(look, found, params, "screen")
    paths.SCREEN_PASS.unlink(missing_ok=True)
    if not said.held:
        atomic.write_text(paths.SCREEN_PASS, "".join(f"{dump}\n" for dump in (BASE, *sorted(found))))
    return _result(said, found, "screen")


def drift(params: config.Params) -> Result:
    """The stage after predict: features and answers of the pool -> reports/drift.*."""
    seen = pool.read_pool()
    look = after(seen, manifest.read(paths.SPLIT_MANIFEST))
    found = verdicts(look, params.pool)
    return _result(_write(look, found, params, "drift"), found, "drift")


def _unusual(stage: str) -> Path:
    return paths.REPORTS / stage / "unusual.jpg"


def _write(look: Look, found: dict[str, dict[str, Finding]], params: config.Params, stage: str) -> DriftReport:
    """The report, which with its pictures is written whatever the verdict."""
    said = report(look, found, params.pool)
    chosen = {dump: next(iter(by.values())) for dump, by in found.items()}
    plots.axes(look.points, chosen, paths.REPORTS / f"{stage}.png")
    show_unusual(look, said, params.ingest.max_pixels, _unusual(stage))
    atomic.write_json(paths.REPORTS / f"{stage}.json", said.to_record())
    return said


def _result(said: DriftReport, found: dict[str, dict[str, Finding]], stage: str) -> Result:
    table = Table("dump", "images", "source", "energy", "p", "rule", "verdict", title=f"drift in {said.space}")
    for dump, by_source in found.items():
        for source, f in by_source.items():
            verdict = "DRIFTED" if f.drifted else "like the rest"
            table.add_row(dump, str(f.images), source, f"{f.energy:.4f}", f"{f.p:.4f}", f.rule, verdict)
    shown = (table if found else "drift: only the first dump is there, nothing to compare",)
    if said.held:
        problem = (
            f"held back by pool.policy: hold: {', '.join(said.held)}. Look at {_unusual(stage)}; then either set "
            f"pool.policy: warn to go on with the dump, or take it out of {paths.DUMP_REGISTRY}"
        )
        return Result(shown, (), (problem,), Exit.REFUSED, said.to_record())
    if said.drifted and said.policy == "warn":
        warning = f"drifted: {', '.join(said.drifted)}; its strangest images: {_unusual(stage)}"
        return Result(shown, (warning,), record=said.to_record())
    return Result(shown, record=said.to_record())
