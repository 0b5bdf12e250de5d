"""Jobs over real HTTP: the same answers as of a call that waits, each caller's own, and none lost by a killed server."""

import contextlib
import io
import json
import os
import signal
import zipfile

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support import live_server
from tests.support.image_files import save
from tests.support.live_server import error, until

RNG = np.random.default_rng(5)
ANNA, BERTA = ({"Authorization": f"Bearer {name}-has-a-long-token"} for name in ("anna", "berta"))
RAW, ZIP = {"Content-Type": "application/octet-stream"}, {"Content-Type": "application/zip"}


def photo(height, width, kind="PNG"):
    return save(Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)), kind)


def packed(images):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as pack:
        for name, data in images.items():
            pack.writestr(name, data)
    return buffer.getvalue()


ARCHIVE = packed({"a.png": photo(30, 40), "broken.png": b"no picture", "deep/b.jpg": photo(64, 50, "JPEG")})


@pytest.fixture(scope="module")
def service():
    """A server with two callers' tokens, which keeps few jobs."""
    tokens = "anna-has-a-long-token\nberta-has-a-long-token"
    started = live_server.start({"MARGINALIA_TOKEN": tokens, "MARGINALIA_JOBS_KEPT": "6"})
    yield started
    started.stop()


@pytest.fixture
def http(service):
    """Anna's client; all her jobs are deleted at the end."""
    with service.client(headers=ANNA) as client:
        yield client
        for job in client.get("/v1/jobs").json()["jobs"]:
            client.delete(f"/v1/jobs/{job['id']}")


def submit(http, body, headers=RAW, **query):
    response = http.post("/v1/jobs", content=body, headers=headers, params=query)
    assert response.status_code == 202, response.text
    job = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    return job


def ended(http, job):
    def look():
        seen = http.get(f"/v1/jobs/{job['id']}").json()
        return seen if seen["state"] in ("done", "failed") else None

    return until(look)


@pytest.mark.parametrize("view", ["mask", "json", "geojson", "overlay", "confidence"])
@pytest.mark.parametrize("resolution", ["fit", "full"])
def test_an_image_has_the_answer_of_a_call_that_waits(http, view, resolution):
    image, query = photo(70, 90), {"view": view, "resolution": resolution, "classes": "red,blue", "size": "50x40"}
    now = http.post("/v1/segment", content=image, headers=RAW, params=query)
    assert now.status_code == 200
    job = ended(http, submit(http, image, **query))
    assert (job["state"], job["done"], job["images"], job["view"]) == ("done", 1, 1, view)
    assert job["submitted"] <= job["started"] <= job["ended"] < job["expires"]
    later = http.get(job["result"])
    assert later.content == now.content
    assert later.headers["content-type"] == now.headers["content-type"]
    assert later.headers["x-bundle-id"] == now.headers["x-bundle-id"] == job["bundle"]


@pytest.mark.parametrize("media_type", ["application/jsonl", "application/zip"])
def test_an_archive_has_the_answer_of_a_call_that_waits(http, media_type):
    headers = {**ZIP, "Accept": media_type}
    now = http.post("/v1/segment/batch", content=ARCHIVE, headers=headers)
    job = ended(http, submit(http, ARCHIVE, headers))
    assert (job["state"], job["done"], job["images"]) == ("done", 3, 3)
    later = http.get(job["result"])
    assert later.content == now.content
    assert later.headers["content-type"] == media_type
    if media_type == "application/jsonl":
        lines = [json.loads(line) for line in later.text.splitlines()]
        assert ["error" in line for line in lines] == [False, True, False]


def test_what_is_wrong_at_once_is_refused_at_once_and_the_rest_fails_as_a_call_would(http):
    for body, headers, query, code in (
        (ARCHIVE[:-30], ZIP, {}, "bad-archive"),
        (photo(9, 9), RAW, {"view": "nothing"}, "bad-query"),
        (photo(9, 9), {"Content-Type": "text/plain"}, {}, "unsupported-type"),
        (photo(9, 9), {**RAW, "Accept": "video/mp4"}, {}, "not-acceptable"),
        (b"", RAW, {}, "empty"),
    ):
        assert error(http.post("/v1/jobs", content=body, headers=headers, params=query)) == code
    assert http.get("/v1/jobs").json() == {"jobs": []}

    job = ended(http, submit(http, b"this is no picture"))
    assert (job["state"], job["error"]["code"], job["result"]) == ("failed", "not-an-image", None)
    response = http.get(f"/v1/jobs/{job['id']}/result")
    assert response.status_code == 400
    assert error(response) == "not-an-image"


def test_each_caller_sees_its_own_jobs_alone(http, service):
    job = submit(http, photo(20, 20))
    with service.client(headers=BERTA) as other, service.client() as nobody:
        assert other.get("/v1/jobs").json() == {"jobs": []}
        for method, path in (("GET", ""), ("GET", "/result"), ("DELETE", "")):
            assert error(other.request(method, f"/v1/jobs/{job['id']}{path}")) == "no-job"
            assert error(nobody.request(method, f"/v1/jobs/{job['id']}{path}")) == "unauthorized"
    assert [each["id"] for each in http.get("/v1/jobs").json()["jobs"]] == [job["id"]]


def test_a_deleted_job_is_gone_with_its_files(http, service):
    job = ended(http, submit(http, photo(20, 20)))
    files = [path for path in (service.folder / "jobs").iterdir() if path.name.startswith(job["id"])]
    assert {path.suffix for path in files} == {".body", ".answer"}
    assert http.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert error(http.get(f"/v1/jobs/{job['id']}")) == "no-job"
    assert not any(path.exists() for path in files)


def test_no_more_jobs_are_kept_than_there_is_room_for(http):
    for _ in range(6):
        submit(http, photo(8, 8))
    response = http.post("/v1/jobs", content=photo(8, 8), headers=RAW)
    assert response.status_code == 503
    assert error(response) == "overloaded"
    assert int(response.headers["retry-after"]) > 0


def test_without_tokens_a_job_is_found_by_its_address_and_there_is_no_list():
    with live_server.shared().client() as http:
        job = ended(http, submit(http, photo(12, 12)))
        assert http.get(job["result"]).status_code == 200
        assert error(http.get("/v1/jobs")) == "no-token"
        assert error(http.get("/v1/jobs/unknown")) == "no-job"
        for path in ("/v1/jobs/", "/v1/jobs/a/b", "/v1/jobs/a%20b"):
            assert error(http.get(path)) == "not-found"
        assert http.put(f"/v1/jobs/{job['id']}").headers["allow"] == "GET, DELETE"
        http.delete(f"/v1/jobs/{job['id']}")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
def test_jobs_go_on_after_a_restart(tmp_path, end):
    """Every process of the server is killed while jobs wait and one runs; the next server answers all of them."""
    settings = {"MARGINALIA_JOBS": str(tmp_path / "jobs"), "MARGINALIA_THREADS": "1"}
    many = packed({f"{i}.png": photo(60, 80) for i in range(60)})
    first = live_server.start(settings)
    with first.client() as http:
        jobs = [
            submit(http, many, {**ZIP, "Accept": "application/zip"}),
            *(submit(http, photo(30, 30)) for _ in range(3)),
        ]
        until(lambda: http.get(f"/v1/jobs/{jobs[0]['id']}").json()["state"] != "waiting")
        assert http.get(f"/v1/jobs/{jobs[3]['id']}").json()["state"] == "waiting"
    if end == signal.SIGKILL:
        for process in (first.process.pid, *first.workers()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        first.process.wait(30)
    else:
        first.stop()

    second = live_server.start(settings)
    with second.client() as http:
        for job in jobs:
            assert ended(http, job)["state"] == "done"
        answer = http.get(f"/v1/jobs/{jobs[0]['id']}/result").content
        assert len(zipfile.ZipFile(io.BytesIO(answer)).namelist()) == 61
    second.stop()


def test_a_server_whose_folder_of_jobs_is_taken_answers_all_else(service):
    other = live_server.start({"MARGINALIA_JOBS": str(service.folder / "jobs")})
    with other.client() as http:
        response = http.post("/v1/jobs", content=photo(9, 9), headers=RAW)
        assert error(response) == "jobs-off"
        assert "another server keeps its jobs there" in response.json()["error"]["message"]
        assert http.post("/v1/segment", content=photo(9, 9), headers=RAW).status_code == httpx.codes.OK
    assert other.events("jobs-off")
    other.stop()
