"""The paths of jobs as OpenAPI has them."""

from typing import Any

from serving.http.negotiate import KINDS
from serving.http.openapi_parts import BINARY, content, errors, parameters, reference
from serving.http.responses import ErrorAnswer, Line
from serving.jobs.routes import JobAnswer, JobsAnswer
from serving.settings import Settings


def paths(limits: str, settings: Settings) -> dict[str, Any]:
    """The paths of jobs."""
    answer = {"content": {"application/json": reference(JobAnswer)}}
    many = {"content": {"application/json": reference(JobsAnswer)}}
    failed = {"content": {"application/json": reference(ErrorAnswer)}}
    job = {"name": "id", "in": "path", "required": True, "description": "Of the job", "schema": {"type": "string"}}
    zip_answers = {"application/jsonl": reference(Line), "application/zip": BINARY}
    return {
        "/v1/jobs": {
            "post": {
                "operationId": "submitJob",
                "summary": "Segment one image, or a zip of many, and fetch the answer later",
                "description": f"{limits} A zip: as for /v1/segment/batch. The answer is kept for {settings.job_ttl_s:g} "
                "seconds after the end; a job goes on when the service is started again.",
                "parameters": parameters(),
                "requestBody": {
                    "required": True,
                    "content": {"image/*": BINARY, "application/octet-stream": BINARY, "application/zip": BINARY},
                },
                "responses": {
                    "202": {"description": "The job, which waits; Location is its address", **answer},
                    **errors("400", "401", "405", "406", "408", "413", "415", "422", "429", "503"),
                },
            },
            "get": {
                "operationId": "listJobs",
                "summary": "The jobs that were sent with this token",
                "responses": {
                    "200": {"description": "The oldest first", **many},
                    **errors("401", "403", "405", "503"),
                },
            },
        },
        "/v1/jobs/{id}": {
            "get": {
                "operationId": "showJob",
                "summary": "How far a job is",
                "parameters": [job],
                "responses": {"200": {"description": "The job", **answer}, **errors("401", "404", "405", "503")},
            },
            "delete": {
                "operationId": "deleteJob",
                "summary": "Stop a job and forget it and its answer",
                "parameters": [job],
                "responses": {"204": {"description": "It is gone"}, **errors("401", "404", "405", "503")},
            },
        },
        "/v1/jobs/{id}/result": {
            "get": {
                "operationId": "fetchJob",
                "summary": "The answer of a job",
                "parameters": [job],
                "responses": {
                    "200": {"description": "As of a call that waits for it", "content": content(KINDS) | zip_answers},
                    "4XX": {"description": "The error of a job that failed", **failed},
                    **errors("401", "404", "405", "409", "503"),
                },
            }
        },
    }
