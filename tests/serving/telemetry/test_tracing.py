"""serving.telemetry.tracing: what a collector would get, from an in-memory exporter; nothing without the variable."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving.telemetry import tracing
from tests.support.live_server import ROOT

PROGRAM = """
import json, sys
from pathlib import Path
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
import numpy as np
from PIL import Image
from starlette.testclient import TestClient
from serving.http import app
from serving import settings
from serving.model import loader
from serving.model.manager import ModelManager
from serving.telemetry import tracing as spans
from tests.support import live_server, tiny_onnx
from tests.support.image_files import save

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
made = tiny_onnx.write(Path(sys.argv[1]) / "one")
chosen = settings.Settings(bundle=made.folder, provider="cpu", threads=1, token="hush-hush")
models = ModelManager(chosen)
models.current = loader.open_runtime(chosen)
web, handler, _ = app.build(chosen, models)
http = TestClient(web, headers={"Authorization": "Bearer hush-hush"})
parent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
picture = save(Image.fromarray(np.zeros((20, 30, 3), np.uint8)))
raw = {"Content-Type": "application/octet-stream"}
http.post("/v1/segment", content=picture, headers=raw | {"traceparent": parent, "X-Request-Id": "mine"})
http.post("/v1/segment", content=b"no image", headers=raw | {"traceparent": "zz-bad"})
http.request("BREW", "/v1/se%0acret")
handler.close()
print(json.dumps({"bundle": made.manifest.id, "spans": [json.loads(s.to_json()) | {
    "begin": s.start_time, "end": s.end_time} for s in exporter.get_finished_spans()]}))
"""


def traced(tmp_path: Path, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_a_request_and_its_phases(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="the SDK is not installed")
    found = traced(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    requests = [span for span in found["spans"] if span["name"] == "request"]
    phases = [span for span in found["spans"] if span["name"] != "request"]
    good, bad, odd = requests
    assert [span["name"] for span in phases] == ["queue", "decode", "run", "encode"]
    assert good["parent_id"] == "0x" + "b" * 16
    assert good["context"]["trace_id"] == "0x" + "a" * 32
    assert good["kind"] == "SpanKind.SERVER"
    assert good["attributes"] == {
        "http.request.method": "POST",
        "http.route": "/v1/segment",
        "http.response.status_code": 200,
        "marginalia.request_id": "mine",
        "marginalia.answer": "mask",
        "marginalia.bundle": found["bundle"],
    }
    edges = [good["begin"]]
    for span in phases:
        assert span["parent_id"] == good["context"]["span_id"]
        assert span["begin"] >= edges[-1]
        edges.append(span["end"])
    assert edges[-1] <= good["end"]
    assert (bad["parent_id"], bad["attributes"]["error.type"]) == (None, "not-an-image")
    assert (odd["attributes"]["http.request.method"], odd["attributes"]["http.route"]) == ("_OTHER", "unknown")
    assert "hush" not in json.dumps(found)
    assert "cret" not in json.dumps(found)


def test_nothing_without_the_variable(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="the SDK is not installed")
    assert traced(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="")["spans"] == []


def test_phases_are_read_from_the_header() -> None:
    assert tracing.phases("queue;dur=0.10, decode;dur=12.00, run;dur=3") == [
        ("queue", 0.1),
        ("decode", 12.0),
        ("run", 3.0),
    ]
    assert tracing.phases("") == []
