"""`marginalia drift --serving`: the service's own statistics against the pool, class by class."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from typer.testing import CliRunner

from marginalia import cli
from pipeline import paths
from pipeline.drift import serving
from pipeline.storage import atomic, predictions
from pipeline.storage.served_statistics import ServedStatistics
from serving.telemetry.prediction_stats import WINDOW_S, PredictionCollector
from tests.support import tiny_settings

CLASSES = ("road", "tree", "sky")
USUAL = (4.0, 2.0, 3.0)


def draw(rng: np.random.Generator, usual: tuple[float, ...] = USUAL) -> np.ndarray:
    return rng.dirichlet(usual)


def write_pool(root: Path, images: int = 80, classes: tuple[str, ...] = CLASSES) -> None:
    rng = np.random.default_rng(0)
    area = np.stack([draw(rng) for _ in range(images)])
    one, text = np.ones(images), np.array([f"i{n}" for n in range(images)])
    confidence = rng.beta(8, 2, images)
    # A later dump of odd areas: no part of the reference.
    dump = np.array(["base"] * (images - 10) + ["later"] * 10)
    area[-10:] = [0, 0, 1]
    path = root / predictions.FILE
    path.parent.mkdir(parents=True)
    np.savez(
        path, id=text, name=text, dump=dump, group=text, split=np.array(["unlabelled"] * images), embedding=area,
        confidence=confidence, margin=one, entropy=one, area=area, doubt=area, classes=np.array(classes),
        margins=np.full((images, predictions.MARGIN_BINS), 1 / predictions.MARGIN_BINS),
    )  # fmt: skip


def statistics(usual: tuple[float, ...] = USUAL, bundles: tuple[str, ...] = ("old", "new"), windows: int = 20) -> str:
    """What the service writes after so many windows a bundle, three answers each; its classes are ordered unlike the pool's."""
    rng, now = np.random.default_rng(1), [0.0]
    seen = PredictionCollector(clock=lambda: now[0])
    for bundle in bundles:
        for _ in range(windows):
            for _ in range(3):
                area = dict(zip(CLASSES, draw(rng, usual if bundle == "new" else (9.0, 1.0, 1.0)), strict=True))
                seen.add(bundle, dict(sorted(area.items())), float(rng.beta(8, 2)))
            now[0] += WINDOW_S
    return seen.text()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_pool(tmp_path)
    tiny_settings.write(tmp_path / "params.yaml")
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["drift", *arguments])
    return done.exit_code, " ".join(done.output.split())


def test_usual_answers_are_like_the_training_images(root: Path) -> None:
    (root / "s.json").write_text(statistics())
    code, said = run("--serving", "s.json")
    assert code == 0
    assert "like the training images" in said
    report = atomic.read_json(root / paths.SERVED)
    assert (report["bundle"], report["drifted"], report["rule"], report["images"]) == ("new", False, "groups", 60)
    assert not any(area["moved"] for area in report["area"].values())
    assert report["area"]["road"]["reference"] == pytest.approx(4 / 9, abs=0.06)  # the later dump is left out


@pytest.mark.parametrize(("policy", "code"), [("warn", 0), ("hold", 3)])
def test_the_classes_that_moved_are_named(root: Path, policy: str, code: int) -> None:
    tiny_settings.write(root / "params.yaml", pool={"policy": policy})
    (root / "s.json").write_text(statistics((4.0, 0.3, 3.0)))
    atomic.write_json(root / "champions/champion.json", {"id": "new"})
    assert run("--serving", "s.json")[0] == code
    report = atomic.read_json(root / paths.SERVED)
    assert report["drifted"]
    assert report["area"]["tree"]["moved"]
    assert report["area"]["tree"]["dump"] < 0.1 < report["area"]["tree"]["reference"]


def test_a_running_service_is_asked_by_url(root: Path) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(statistics().encode())

        def log_message(self, *arguments: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        code, said = run("--serving", f"http://127.0.0.1:{server.server_port}/v1/statistics")
    assert code == 0, said


class Guarded(BaseHTTPRequestHandler):
    """A service with a token; /elsewhere is a redirect to another port, which counts what it was sent."""

    sent: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        given = self.headers["Authorization"]
        self.sent.append(given)
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/v1/statistics")
        else:
            self.send_response(200 if given == f"Bearer {TOKEN}" else 401)
        self.end_headers()
        if given == f"Bearer {TOKEN}" and self.path != "/elsewhere":
            self.wfile.write(statistics().encode())

    def log_message(self, *arguments: object) -> None: ...


TOKEN = "a-token-of-the-service"


def test_a_service_with_a_token(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the variable or the option; never shown, and not handed on to where a redirect leads."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        asked = ("--serving", f"{url}/v1/statistics")

        monkeypatch.delenv("MARGINALIA_TOKEN", raising=False)
        code, said = run(*asked)
        assert (code, "answers only with a token; set MARGINALIA_TOKEN" in said) == (1, True)
        assert run(*asked, "--token", TOKEN)[0] == 0
        for several in (f"{TOKEN}\n", f"\n {TOKEN}\r\nthe-next-token"):  # as the service's own variable may be
            monkeypatch.setenv("MARGINALIA_TOKEN", several)
            assert run(*asked)[0] == 0

        Guarded.sent.clear()
        code, said = run("--serving", f"{url}/elsewhere")
        assert (code, Guarded.sent) == (1, [f"Bearer {TOKEN}", None])
        assert TOKEN not in said
        for wrong in ("another-secret", "two\nlines-of-a-secret", " "):
            monkeypatch.setenv("MARGINALIA_TOKEN", wrong)
            code, said = run(*asked)
            assert code == 1
            assert "MARGINALIA_TOKEN" in said
            assert "secret" not in said
        server.shutdown()
    assert TOKEN not in (root / paths.SERVED).read_text()


def test_what_cannot_be_compared_is_named(root: Path) -> None:
    settings = tiny_settings.pool()
    for text, why in (("[]", "format 1"), ("{", "cannot be read"), ('{"format": 2}', "format 1")):
        (root / "s.json").write_text(text)
        assert why in run("--serving", "s.json")[1]
    assert "gone.json: cannot be read" in run("--serving", "gone.json")[1]
    value = ServedStatistics.model_validate_json(statistics())
    with pytest.raises(predictions.PoolError, match="champion other has answered nothing; answered: old, new"):
        serving.answers(value, "other")
    with pytest.raises(predictions.PoolError, match="answered nothing yet"):
        serving.answers(value.model_copy(update={"bundles": []}), None)
    found = serving.answers(value, None)
    with pytest.raises(predictions.PoolError, match="different classes"):
        serving.compare(predictions.read_pool(), found._replace(classes=["road", "tree", "sea"]), settings)
    plain = json.loads(statistics())
    sample = plain["bundles"][1]["windows"][0]["sample"]
    sample["area"].pop()
    with pytest.raises(predictions.PoolError, match="bundle new: its samples do not fit its classes"):
        serving.answers(ServedStatistics.model_validate(plain), None)
    del sample["area"]
    (root / "s.json").write_text(json.dumps(plain))
    with pytest.raises(predictions.PoolError, match=r"bundles\.1\.windows\.0\.sample\.area is missing or odd"):
        serving.read_statistics("s.json")


def test_a_handful_of_answers_brings_no_verdict(root: Path) -> None:
    """However odd they are: what is asked for is more of them."""
    (root / "s.json").write_text(statistics((0.1, 9.0, 0.1), windows=9))
    code, said = run("--serving", "s.json")
    assert code == 1
    assert "bundle new: 27 sampled answers, and a verdict takes 30; let the service answer 3 more images" in said
    assert not (root / paths.SERVED).exists()
    (root / "s.json").write_text(statistics((0.1, 9.0, 0.1), windows=10))
    assert run("--serving", "s.json")[0] == 0
    assert atomic.read_json(root / paths.SERVED)["drifted"]
    assert f"at least {serving.FEWEST} sampled answers" in run("--help")[1]


def test_a_pool_of_another_model_than_the_champion_is_told(root: Path) -> None:
    (root / "s.json").write_text(statistics())
    atomic.write_json(root / "champions/champion.json", {"id": "new"})
    atomic.write_bytes(root / "champions/new/student.safetensors", b"champion")
    for weights, told in ((b"champion", False), (b"a challenger that was not promoted", True)):
        atomic.write_bytes(root / paths.STUDENT_WEIGHTS, weights)
        assert ("not the champion" in run("--serving", "s.json")[1]) == told
        assert bool(atomic.read_json(root / paths.SERVED)["warning"]) == told
