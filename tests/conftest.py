"""One setting for every test: no telemetry, no hub, one thread's worth of determinism."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests import onnxruntime themselves
os.environ.setdefault("MPLBACKEND", "Agg")

import httpx
import pytest

from tests.support import live_server
from training.models.torchvision_operators import ensure_torchvision

ROOT = Path(__file__).parents[1]
ensure_torchvision()  # some tests import timm themselves


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real labelled photographs beside the checkout; the product runs without them."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.exists():
        pytest.skip(f"{folder} is absent: real photographs are not part of the repository")
    return folder


@pytest.fixture(scope="module")
def server() -> live_server.Server:
    """The real server, one process for the whole session; a module that needs another overrides this."""
    return live_server.shared()


@pytest.fixture(scope="module")
def http(server: live_server.Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
