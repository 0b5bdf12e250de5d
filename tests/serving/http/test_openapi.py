"""/v1/openapi.json against the service that it describes, and its structure against OpenAPI 3.1."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.http.negotiate import KINDS, MANY_KINDS
from serving.http.query import Query
from serving.telemetry import metrics
from tests.support.live_server import Server, error

METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> dict[str, Any]:
    return http.get("/v1/openapi.json").json()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def inner(value: object) -> Iterator[dict[str, Any]]:
    """Every object inside, itself included."""
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from inner(part)
    elif isinstance(value, list):
        for part in value:
            yield from inner(part)


def test_every_route_is_described_and_every_description_is_a_route(server: Server, document: dict[str, Any]) -> None:
    source = Path(__file__).parents[3].joinpath("serving/http/app.py").read_text()
    found = re.findall(r'"(/v1/[^"]*)": Route\("([A-Z, ]+)"', source)
    routes = {(path, method.lower()) for path, methods in found for method in methods.split(", ")}
    assert routes
    assert {(path, method) for path, method, _ in operations(document)} == routes
    with server.client() as http:
        for path, method, _ in operations(document):
            answered = http.request(method.upper(), path.replace("{id}", "unknown"))
            assert answered.status_code != 405
            assert answered.status_code != 404 or error(answered) == "no-job"


def test_the_structure_is_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    assert {"title", "version"} <= set(document["info"])
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)
    for path, method, operation in operations(document):
        assert path.startswith("/")
        assert method in METHODS
        assert all(re.fullmatch("[1-5]([0-9][0-9]|XX)", status) for status in operation["responses"])
        assert all(response["description"] for response in operation["responses"].values())
        for parameter in operation.get("parameters", ()):
            assert {"name", "in", "schema", "description"} <= set(parameter)
            assert parameter["in"] in ("query", "header", "path")
        contents = [response.get("content", {}) for response in operation["responses"].values()]
        contents += [operation["requestBody"]["content"]] if "requestBody" in operation else []
        for content in contents:
            for media_type, part in content.items():
                assert re.fullmatch(r"[a-z]+/[a-z0-9.+*-]+(; [a-z]+=[a-z]+)?", media_type)
                assert "schema" in part


def test_every_reference_resolves_and_every_schema_is_used(document: dict[str, Any]) -> None:
    references = {part["$ref"] for part in inner(document) if "$ref" in part}
    assert references == {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    for part in inner(document["components"]["schemas"]):
        if "required" in part and isinstance(part["required"], list):
            assert set(part["required"]) <= set(part["properties"])


def test_parameters_are_those_of_the_query(http: httpx.Client, document: dict[str, Any]) -> None:
    for path in ("/v1/segment", "/v1/segment/batch", "/v1/jobs"):
        described = {item["name"]: item["schema"] for item in document["paths"][path]["post"]["parameters"]}
        assert list(described) == list(Query.model_fields)
        for name, schema in described.items():
            assert schema["type"] in ("string", "number")
            assert schema.get("default") == Query.model_fields[name].default
            for wrong in [schema["maximum"] + 1, schema["minimum"] - 1] if schema["type"] == "number" else [","]:
                response = http.post(path, params={name: wrong})
                assert error(response) == "bad-query"
                assert name in response.json()["error"]["message"]
        assert described["view"]["enum"] == list(dict.fromkeys(kind.view for kind in KINDS))


def test_answers_and_errors_are_described(document: dict[str, Any]) -> None:
    for path, kinds in (("/v1/segment", KINDS), ("/v1/segment/batch", MANY_KINDS)):
        responses = document["paths"][path]["post"]["responses"]
        described = {media_type.partition(";")[0] for media_type in responses["200"]["content"]}
        assert described == {kind.media_type for kind in kinds}
        for status, response in responses.items():
            if status != "200":
                named = re.sub(r"\([^)]*\)", "", response["description"]).partition(";")[0].partition(":")[0]
                assert set(named.strip().split(", ")) <= {code + more for code in metrics.REASONS for more in ("", " ")}
