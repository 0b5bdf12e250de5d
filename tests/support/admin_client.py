"""An operator's client of a live server: change its models with the token, and read its metrics."""

from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.live_server import TOKEN, Server

AUTH = {"Authorization": f"Bearer {TOKEN}"}


def client(server: Server) -> httpx.Client:
    return server.client(headers=AUTH)


def below(server: Server, folder: Path) -> str:
    """A bundle's folder as the load route wants it."""
    return str(folder.relative_to(server.folder))


def load(http: httpx.Client, path: str, **more: Any) -> httpx.Response:
    return http.post("/v1/models/load", json={"bundle": path, **more})


def metric(http: httpx.Client, name: str, **labels: str) -> float:
    """The value of one series, 0 where it is not there."""
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return 0.0
