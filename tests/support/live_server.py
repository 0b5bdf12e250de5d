"""Real servers in processes of their own, spoken to over real HTTP; each is started once for the whole run."""

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pipeline.storage import atomic
from tests.support import tiny_onnx

ROOT = Path(__file__).parents[2]
TOKEN = "correct-horse-battery-staple"
START = "from serving.bento import run; import sys; run.main('127.0.0.1', int(sys.argv[1]))"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The condition's first true value; a failure if it stays false. A limit, not a measurement."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if value := condition():
                return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")


@dataclass
class Server:
    """A started server: its address, its folder (champions/ inside), its process and what it wrote."""

    url: str
    port: int
    folder: Path
    process: subprocess.Popen[bytes]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, **options)

    def log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith('{"time"')]
        return [line for line in lines if line["event"] == kind]

    def workers(self) -> list[int]:
        """Process ids below the server's own."""
        found, wave = [], [self.process.pid]
        while wave:
            paths = [Path(f"/proc/{pid}/task/{pid}/children") for pid in wave]
            wave = [int(child) for path in paths if path.exists() for child in path.read_text().split()]
            found += wave
        return found

    def resident_mb(self) -> float:
        """Memory of all its worker processes, MiB."""
        page = os.sysconf("SC_PAGE_SIZE") / (1 << 20)
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in self.workers())

    def peak_mb(self) -> float:
        """Largest memory that any of its worker processes ever had, MiB (VmHWM)."""
        found = []
        for pid in self.workers():
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            found += [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")]
        return max(found)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def point(champions: Path, bundle_folder: Path) -> None:
    """Make `bundle_folder` the champion, as the gate does: atomically, relative to the folder above champions/."""
    named = os.path.relpath(bundle_folder, champions.parent)
    atomic.write_json(champions / "champion.json", {"id": bundle_folder.parent.name, "bundle": named})


def start(settings: dict[str, str], command: list[str] | None = None, cwd: Path = ROOT) -> Server:
    """A server over a fresh folder whose champion is the tiny model; "{folder}" and "{port}" in a setting are its own."""
    folder = Path(tempfile.mkdtemp(prefix="marginalia-server-"))
    made = tiny_onnx.write(folder / "champions" / "first" / "bundle")
    point(folder / "champions", made.folder)
    port = free_port()
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MARGINALIA_", "BENTOML_", "PROMETHEUS_"))}
    plain |= {"MARGINALIA_CHAMPIONS": str(folder / "champions" / "champion.json"), "MARGINALIA_THREADS": "1"}
    plain |= {"BENTOML_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    plain |= {"MARGINALIA_JOBS": str(folder / "jobs")}
    launch = [sys.executable, *(command or ["-c", START, str(port)])]
    launch = [part.replace("{port}", str(port)) for part in launch]
    settings = {
        name: value.replace("{folder}", str(folder)).replace("{port}", str(port)) for name, value in settings.items()
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(launch, cwd=cwd, env=plain | settings, stdout=log, stderr=log)
    server = Server(f"http://127.0.0.1:{port}", port, folder, process)
    atexit.register(server.stop)

    def ready() -> bool:
        assert process.poll() is None, server.log()
        return httpx.get(server.url + "/readyz", trust_env=False).status_code == 200

    until(ready, 180)  # three Python starts; on a machine busy with training that takes a while
    return server


@functools.cache
def shared() -> Server:
    """The server most tests talk to: no token, small limits."""
    return start(
        {
            "MARGINALIA_MAX_BODY_MB": "2",
            "MARGINALIA_MAX_LARGE_BODY_MB": "2",
            "MARGINALIA_MAX_PIXELS": "2000000",
            "MARGINALIA_POLL_S": "0.1",
            "MARGINALIA_HEAD_TIMEOUT_S": "5",
        }
    )


@functools.cache
def guarded() -> Server:
    """One with a token, and room for one request."""
    return start(
        {
            "MARGINALIA_TOKEN": TOKEN,
            "MARGINALIA_CONCURRENCY": "1",
            "MARGINALIA_QUEUE": "0",
            "MARGINALIA_MAX_BODY_MB": "4",
            "MARGINALIA_MAX_LARGE_BODY_MB": "4",
        }
    )


# A server with a token, whose models an operator changes: a quick watcher, a shadow of every image, statistics below it.
KEPT = {
    "MARGINALIA_TOKEN": TOKEN,
    "MARGINALIA_POLL_S": "0.1",
    "MARGINALIA_SHADOW_SHARE": "1",
    "MARGINALIA_STATISTICS": "{folder}/statistics",
    "MARGINALIA_STATISTICS_EVERY_S": "0.2",
}


@functools.cache
def kept() -> Server:
    return start(KEPT)


def error(response: httpx.Response) -> str:
    """The code of an error answer, after checking that it has the one shape."""
    assert response.headers["content-type"] == "application/json", response.text
    body = response.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "request_id"]
    assert body["error"]["request_id"] == response.headers["x-request-id"]
    assert len(body["error"]["message"]) > 10
    return str(body["error"]["code"])
