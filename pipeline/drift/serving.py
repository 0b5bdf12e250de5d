"""What the running service answers against what the champion answered on its training images: `marginalia drift --serving`.

The service's statistics (GET /v1/statistics, or the file it dumps; `pipeline.storage.served_statistics`) hold samples of
class areas and confidences by window of time. The reference is data/pool/images.npz, where predict left the same numbers
of the student over the labelled images and those of the first dump; where that student did not become the champion, a
warning says so. Windows are groups: neighbours in time are not independent draws.
"""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError
from rich.table import Table

from pipeline import config, paths
from pipeline.drift import predictions as shifts
from pipeline.drift import two_sample
from pipeline.drift.records import AreaShift, Finding, ServedReport
from pipeline.drift.two_sample import Cloud
from pipeline.stage import Exit, Result
from pipeline.storage import atomic, predictions
from pipeline.storage.predictions import FILE as POOL
from pipeline.storage.predictions import Floats, PoolError, PredictionPool
from pipeline.storage.served_statistics import ServedStatistics

SERVED = "served"
MAX_BYTES = 64 << 20
FEWEST = 30  # sampled answers: a few images of one afternoon stand for no stream


class Answers(NamedTuple):
    """One bundle's samples: its id, class names, area N x K, confidence (N,), the start of each one's window."""

    bundle: str
    classes: list[str]
    area_NK: Floats
    confidence_N: Floats
    window_N: list[str]


def read_statistics(where: str, token: str | None = None) -> ServedStatistics:
    """The statistics in a file or behind http(s)://, where `token` is sent as `Authorization: Bearer`.

    Raises:
        PoolError: not reachable, too large, not of format 1, or a field is not what that says; names the source, and
            never the token.
    """
    try:
        if where.startswith(("http://", "https://")):
            with urllib.request.urlopen(_request(where, token), timeout=60) as answer:
                data = answer.read(MAX_BYTES + 1)
        else:
            with Path(where).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise PoolError(f"{where}: more than {MAX_BYTES >> 20} MiB: these are no statistics of ours")
        value = json.loads(data)
    except urllib.error.HTTPError as error:
        if error.code != 401:
            raise PoolError(f"{where}: cannot be read as statistics ({error}); ask GET /v1/statistics") from error
        advice = (
            "set MARGINALIA_TOKEN to one of its tokens" if token is None else "the one in MARGINALIA_TOKEN is not its"
        )
        raise PoolError(f"{where}: the service answers only with a token; {advice}") from None
    except (OSError, ValueError) as error:
        raise PoolError(f"{where}: cannot be read as statistics ({error}); ask GET /v1/statistics") from error
    if not isinstance(value, dict) or value.get("format") != 1:
        raise PoolError(f"{where}: not the statistics of the service (format 1); ask GET /v1/statistics")
    try:
        return ServedStatistics.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise PoolError(f"{where}: {field} is missing or odd ({first['msg']}); ask GET /v1/statistics") from error


def _request(url: str, token: str | None) -> urllib.request.Request:
    """A GET of `url`; the token goes to that address alone, not along with a redirect."""
    request = urllib.request.Request(url)
    if token is not None:
        plain = token.strip().partition("\n")[0].rstrip()  # of several, one a line, the first
        if not plain or not plain.isascii() or not plain.isprintable():
            raise PoolError("MARGINALIA_TOKEN is empty or has other than printable ASCII characters")
        request.add_unredirected_header("Authorization", f"Bearer {plain}")
    return request


def answers(statistics: ServedStatistics, champion: str | None) -> Answers:
    """The samples of the champion's bundle, or without one of the bundle that answered last.

    Raises:
        PoolError: that bundle answered nothing or fewer than `FEWEST`, or its samples do not fit its classes.
    """
    bundles = {item.bundle: item for item in statistics.bundles}
    if not bundles:
        raise PoolError("the service has answered nothing yet")
    if champion is not None and champion not in bundles:
        raise PoolError(f"the champion {champion[:12]} has answered nothing; answered: {', '.join(bundles)}")
    chosen = bundles[champion] if champion else statistics.bundles[-1]

    rows = [row for window in chosen.windows for row in window.sample.area]
    confidence = np.array([value for window in chosen.windows for value in window.sample.confidence], np.float64)
    windows = [str(window.start) for window in chosen.windows for _ in window.sample.confidence]
    try:
        area_NK = np.array(rows, np.float64).reshape(len(confidence), len(chosen.classes))
    except ValueError as error:
        raise PoolError(f"bundle {chosen.bundle}: its samples do not fit its classes ({error})") from error
    if not len(confidence) or not (np.isfinite(area_NK).all() and np.isfinite(confidence).all()):
        raise PoolError(f"bundle {chosen.bundle}: no sample of its answers, or one with numbers that are not finite")
    if (count := len(confidence)) < FEWEST:
        raise PoolError(
            f"bundle {chosen.bundle}: {count} sampled answers, and a verdict takes {FEWEST}; let the service answer "
            f"{FEWEST - count} more images, then ask again"
        )
    return Answers(chosen.bundle, chosen.classes, area_NK, confidence, windows)


def compare(pool: PredictionPool, served: Answers, settings: config.Pool) -> tuple[Finding, dict[str, AreaShift]]:
    """Verdict on areas and confidence together, and which classes moved.

    Raises:
        PoolError: the bundle has other classes than the pool.
    """
    names = [str(name) for name in pool.classes]
    if sorted(names) != sorted(served.classes):
        odd = sorted(set(names) ^ set(served.classes))
        raise PoolError(f"bundle {served.bundle} and {POOL} have different classes ({odd}); run the predict stage")

    ours = (pool.split == "labelled") | (pool.dump == two_sample.BASE)
    order = [served.classes.index(name) for name in names]
    area_NK = np.concatenate([pool.area[ours], served.area_NK[:, order]])
    confidence_N = np.concatenate([pool.confidence[ours], served.confidence_N])

    count = len(served.confidence_N)
    points = Cloud(
        feature_ND=np.concatenate([np.sqrt(area_NK), confidence_N[:, None]], axis=1),
        dump=np.array([*([two_sample.BASE] * int(ours.sum())), *([SERVED] * count)]),
        group=np.array([*map(str, pool.group[ours]), *served.window_N]),
        split=np.array([*map(str, pool.split[ours]), *(["unlabelled"] * count)]),
    )
    finding = two_sample.compare(points, SERVED, settings)
    return finding, shifts.areas(points, area_NK, pool.classes, SERVED, settings)


def other_model(champion: str | None) -> str | None:
    """Why the pool's answers may not be the champion's: the student of the last training did not become it."""
    student = paths.STUDENT_WEIGHTS
    theirs = paths.CHAMPIONS / str(champion) / student.name
    if (
        champion is None
        or not (theirs.exists() and student.exists())
        or atomic.sha256(theirs) == atomic.sha256(student)
    ):
        return None
    return (
        f"{POOL} holds the answers of {student}, which is not the champion {champion[:12]}: what differs may be the "
        f"two models; to compare with the champion's own, put {theirs} and its train.json there and run the predict stage"
    )


def run(params: config.Params, where: str, token: str | None = None) -> Result:
    """`marginalia drift`: writes reports/served.json; exit code 3 when `pool.policy` is hold and the answers have drifted.

    `token`: of the service, where it asks for one.
    """
    champion = str(atomic.read_json(paths.CHAMPION)["id"]) if paths.CHAMPION.exists() else None
    served = answers(read_statistics(where, token), champion)
    finding, areas = compare(predictions.read_pool(), served, params.pool)
    warning = other_model(champion)
    report = ServedReport(
        **dict(finding), source=where.split("?")[0], bundle=served.bundle, warning=warning, area=areas
    )
    record = report.model_dump(mode="json")
    atomic.write_json(paths.SERVED, record)

    title = f"bundle {served.bundle[:12]}: {finding.images} answers"
    table = Table("class", "reference", "served", "p", "", title=title)
    for name, area in sorted(areas.items(), key=lambda item: item[1].p):
        shares = f"{100 * area.reference:.2f} %", f"{100 * area.dump:.2f} %"
        table.add_row(name, *shares, f"{area.p:.4f}", "MOVED" if area.moved else "")
    verdict = "DRIFTED" if finding.drifted else "like the training images"
    line = f"{verdict}: energy {finding.energy:.4f}, p {finding.p:.4f}, {finding.rule}; {paths.SERVED}"
    warnings = (warning,) if warning else ()
    if finding.drifted and params.pool.policy == "hold":
        problem = f"{where.split('?')[0]}: the answers have drifted, and pool.policy is hold; see {paths.SERVED}"
        return Result((table, line), warnings, (problem,), Exit.REFUSED, record)
    return Result((table, line), warnings, record=record)
