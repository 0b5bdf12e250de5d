"""serving.bento.supervision: why a worker ended, by its exit code and what the kernel counts."""

import json
import signal
from types import SimpleNamespace

import pytest

from serving.bento.supervision import Supervisor
from serving.telemetry import restarts


@pytest.mark.parametrize(
    ("exit_code", "oom_kills", "cause"),
    [
        (-signal.SIGKILL, 1, "out-of-memory"),
        (-signal.SIGKILL, 0, "killed"),
        (-signal.SIGSEGV, 1, "killed"),  # the kernel kills by no other signal
        (-signal.SIGBUS, 0, "killed"),
        (-signal.SIGRTMIN - 1, 0, "killed"),
        (-signal.SIGTERM, 0, "left"),
        (0, 0, "left"),
        (3, 0, "failed"),
        (None, 0, "failed"),
    ],
)
def test_the_next_worker_learns_why_the_last_one_ended(
    exit_code: int | None, oom_kills: int, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = [5]  # before: other processes of the group
    supervisor = Supervisor(lambda: counted[0])
    watcher = SimpleNamespace(env={}, is_active=lambda: True)
    supervisor.before_spawn(watcher)
    supervisor.after_spawn(pid=7)
    counted[0] += oom_kills
    supervisor.after_reap(watcher, process_pid=7, exit_code=exit_code)

    supervisor.before_spawn(watcher)
    monkeypatch.setenv(restarts.VARIABLE, watcher.env[restarts.VARIABLE])
    assert restarts.from_environment() == dict.fromkeys(restarts.CAUSES, 0) | {cause: 1}


def test_an_oom_kill_is_the_last_workers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = [0]
    supervisor = Supervisor(lambda: counted[0])
    watcher = SimpleNamespace(env={}, is_active=lambda: True)
    for more in (1, 0):
        supervisor.before_spawn(watcher)
        supervisor.after_spawn(pid=7)
        counted[0] += more
        supervisor.after_reap(watcher, process_pid=7, exit_code=-signal.SIGKILL)
    supervisor.before_spawn(watcher)
    found = json.loads(watcher.env[restarts.VARIABLE])
    assert (found["out-of-memory"], found["killed"]) == (1, 1)


def test_a_worker_that_is_told_to_end_is_no_restart() -> None:
    supervisor = Supervisor(lambda: 0)
    watcher = SimpleNamespace(env={}, is_active=lambda: False)
    supervisor.before_spawn(watcher)
    supervisor.after_spawn(pid=7)
    supervisor.after_reap(watcher, process_pid=7, exit_code=-signal.SIGTERM)
    supervisor.before_spawn(watcher)
    assert sum(json.loads(watcher.env[restarts.VARIABLE]).values()) == 0
