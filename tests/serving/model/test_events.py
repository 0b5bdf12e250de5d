"""model.events: what the log and callers see of an event, and how many are kept."""

import logging
from pathlib import Path

import pytest

from export.bundle.bundle import BundleError
from serving.model.events import NEWEST, BundleRefused, Candidate, ChampionRefused, EventLog, RolledBack
from serving.settings import Settings
from tests.support.threaded_server import told


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(Settings(champions=tmp_path / "champions" / "champion.json"))


def test_the_newest_events_are_kept_in_order(log: EventLog) -> None:
    for i in range(NEWEST + 5):
        log.add(RolledBack(bundle=f"b{i}", before="a"))
    assert [event.bundle for event in log.newest()] == [f"b{i}" for i in range(5, NEWEST + 5)]


def test_callers_see_no_path_above_the_allowed_folder(
    log: EventLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "marginalia")
    folder = tmp_path / "champions" / "b"
    error = BundleError(f"{folder / 'model.onnx'}: missing; restore the bundle")
    log.add_refusal(BundleRefused.of(Candidate(source="load", path=str(folder)), error, None), error)
    (kept,) = log.newest()
    assert kept.model_dump(exclude={"time"}) == {
        "event": "bundle-refused",
        "error": "champions/b/model.onnx: missing; restore the bundle",
        "source": "load",
        "path": "champions/b",
        "cause": "bundle",
        "still_serving": None,
    }
    (line,) = told(caplog, "bundle-refused")
    assert (line["path"], line["error"]) == (str(folder), str(error))


def test_an_error_that_nobody_foresaw_has_its_traceback_in_the_log_only(
    log: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "marginalia")
    error = RuntimeError("device lost")
    candidate = Candidate(source="pointer", path="x")
    log.add_refusal(ChampionRefused.of(candidate, error, None, retry_s=4.0), error)
    (kept,) = log.newest()
    assert (kept.error, kept.cause, kept.retry_s) == ("RuntimeError('device lost')", "failed", 4.0)
    (line,) = told(caplog, "bundle-refused")
    assert (line["error"], line["retry_s"], "trace" in line) == ("device lost", 4.0, True)
