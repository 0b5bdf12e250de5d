"""Tokens, what may stand in the log, and the labels of the metrics; and a full house."""

import base64
import contextlib
import socket
from typing import get_args

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from export.bundle.manifest import Precision, Provider
from serving.telemetry import metrics, restarts
from tests.support import live_server, tiny_onnx
from tests.support.image_files import save
from tests.support.live_server import TOKEN, Server, error, until

MARK = b"secret-inside-the-picture-0123456789"
PICTURE = save(Image.fromarray(np.zeros((20, 20, 3), np.uint8))) + MARK
RAW = {"Content-Type": "application/octet-stream"}
GOOD = RAW | {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def server() -> Server:
    return live_server.guarded()


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN,
     "Bearer " + "x" * 30_000, f"Bearer {TOKEN} {TOKEN}", "Bearer caf\xe9", f"Bearer {TOKEN.upper()}"],
)  # fmt: skip
def test_wrong_tokens(http: httpx.Client, given: str | None) -> None:
    header = {} if given is None else {"Authorization": given.encode("latin-1")}
    for response in (
        http.post("/v1/segment", content=PICTURE, headers=RAW | header),
        http.post("/v1/segment/batch", content=PICTURE, headers=header),
        http.get("/v1/model", headers=header),
    ):
        assert (response.status_code, error(response)) == (401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
        assert TOKEN not in response.text


def test_the_token_opens(http: httpx.Client) -> None:
    assert http.post("/v1/segment", content=PICTURE, headers=GOOD).status_code == 200
    assert http.get("/v1/model", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
    assert http.get("/v1/openapi.json").json()["security"] == [{"token": []}]


def test_slow_bodies_keep_nobody_out_and_are_cut(server: Server, http: httpx.Client) -> None:
    """Room for one request: three that send one byte of their bodies do not take it, and hear 408 in the end."""
    head = f"POST /v1/segment HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: image/png\r\n"
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 20)) for _ in range(3)]
        for link in slow:
            link.sendall(head.encode() + b"Expect: 100-continue\r\nContent-Length: 1000\r\n\r\n")
        for link in slow:  # "continue" is said when the body is asked for: all three are let in before the fourth comes
            assert link.recv(4096).startswith(b"HTTP/1.1 100")
            link.sendall(b"x")
        assert http.post("/v1/segment", content=PICTURE, headers=GOOD).status_code == 200
        for link in slow:
            answer = b""
            while b"}}" not in answer:
                piece = link.recv(4096)
                assert piece, answer
                answer += piece
            assert answer.startswith(b"HTTP/1.1 408")
            assert b"slow-body" in answer
    assert http.post("/v1/segment", content=PICTURE, headers=GOOD).status_code == 200


def test_neither_token_nor_image_reaches_the_log(server: Server, http: httpx.Client) -> None:
    http.post("/v1/segment", content=PICTURE, headers=GOOD | {"X-Request-Id": "last-one"})
    http.post("/v1/segment", content=MARK, headers=GOOD)
    http.post("/v1/segment", files={"image": (MARK.decode(), MARK)}, headers={"Authorization": f"Bearer {TOKEN}"})
    http.get(f"/v1/model?token={TOKEN}")
    http.get("/v1/model", headers={"Authorization": f"Basic {TOKEN}"})
    for body in ({"bundle": TOKEN}, {"bundle": MARK.decode(), "token": TOKEN}):
        http.post("/v1/models/load", json=body, headers={"Authorization": f"Bearer {TOKEN}"})
    until(lambda: "last-one" in server.log())
    log = server.log()
    encoded = base64.b64encode(MARK).decode()[:16]
    for secret in (TOKEN, MARK.decode(), encoded, "IHDR"):
        assert secret not in log


def test_labels_come_from_fixed_sets(server: Server, http: httpx.Client) -> None:
    for hostile in ('x"} 1\nforged{a="', "%22%7D%0A", "a" * 500, "né", "../.."):
        quoted = httpx.URL("/v1/").join(hostile.replace("\n", "%0a").replace('"', "%22"))
        http.get(str(quoted))
        http.request("BREW", "/v1/segment", headers={"X-Request-Id": "a", "User-Agent": hostile.encode().hex()})
        http.post("/v1/segment", content=PICTURE, headers=RAW | {"Accept": "image/" + hostile.encode().hex()})
        http.post("/v1/segment", files={hostile.encode().hex(): ("a", PICTURE)}, headers={"Authorization": TOKEN})
        http.post("/v1/models/load", json={"bundle": hostile}, headers=GOOD | {"Content-Type": "application/json"})
    allowed = {
        "answer": set(metrics.ANSWERS),
        "status": {"2xx", "4xx", "5xx"},
        "phase": set(metrics.PHASES),
        "reason": set(metrics.REASONS),
        "class_name": {item["name"] for item in tiny_onnx.CLASSES},
        "result": {*metrics.SWAPS, *metrics.SHADOWED},
        "cause": {*metrics.CAUSES, *restarts.CAUSES},
        "slot": set(metrics.SLOTS),
        "bundle": {http.get("/v1/model", headers=GOOD).json()["bundle"]},
        "provider": set(get_args(Provider)),
        "precision": set(get_args(Precision)),
    }
    for family in text_string_to_metric_families(http.get("/metrics").text):
        if family.name.startswith(("python_", "process_")):
            continue  # the client library's own, of this process: their labels are fixed there
        assert family.name.startswith("marginalia_")
        for sample in family.samples:
            for label, value in sample.labels.items():
                assert label in ("le", "pid") or value in allowed[label], (sample.name, label, value)


def test_no_error_was_internal(server: Server) -> None:
    assert server.events("internal-error") == []
    assert "Traceback" not in server.log()
