"""Night images into a day set are flagged before training, and the policy decides."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.storage import atomic
from tests.support import tiny_project
from tests.support.command_line import marginalia

DAY = [("labelled", "base", "a", 8), *(("unlabelled", "base", g, 8) for g in "bcd")]


@pytest.mark.parametrize(("policy", "code"), [("warn", 0), ("hold", 3), ("train", 0)])
def test_night_dump_is_flagged_without_any_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], policy: str, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    parts = [*DAY, ("unlabelled", "more", "m", 12), ("unlabelled", "dusk", "n", 10)]
    tiny_project.write_data(tmp_path, parts, dark=["dusk"])
    tiny_project.write_params(tmp_path, pool={"permutations": 199, "policy": policy})
    assert marginalia("stage", "screen") == code
    said = atomic.read_json(Path("reports/screen.json"))  # written in both cases
    assert said["drifted"] == ["dusk"]  # and the other new dump, which is like the rest, is not
    assert said["held"] == (["dusk"] if policy == "hold" else [])
    assert said["dumps"]["dusk"]["p"] < 0.01
    passed = Path("reports/screen.pass")  # training depends on this: which dumps may train, and nothing else
    assert (passed.read_text() if passed.exists() else None) == (None if policy == "hold" else "base\ndusk\nmore\n")
    told = " ".join(capsys.readouterr().err.split())
    assert ("held back by pool.policy: hold: dusk" in told) == (policy == "hold")
    assert ("warning: drifted: dusk" in told) == (policy == "warn")
    assert ("reports/screen/unusual.jpg" in told) == (policy != "train")
    with Image.open("reports/screen/unusual.jpg") as page:  # ten night images, on two rows
        middle = np.asarray(page.convert("L"))[60:180]
        assert page.size[1] > 400
    assert (middle < 60).mean() > 0.2  # they are dark
    with Image.open("reports/screen.png") as picture:
        assert min(picture.size) > 300
    if policy == "warn":
        tiny_project.write_params(tmp_path, pool={"permutations": 299, "drift_p": 0.005})
        assert marginalia("stage", "screen") == 0
        assert atomic.read_json(Path("reports/screen.json")) != said
        assert passed.read_text() == "base\ndusk\nmore\n"
        tiny_project.write_params(tmp_path, pool={"permutations": 199, "policy": "hold"})
        assert marginalia("stage", "screen") == 3
        assert not passed.exists()


@pytest.mark.slow
def test_the_students_features_see_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = [*DAY, ("unlabelled", "more", "m", 12), ("unlabelled", "dusk", "n", 10)]
    tiny_project.write_data(tmp_path, parts, dark=["dusk"])
    tiny_project.write_student(tmp_path, tiny_project.trained())
    tiny_project.write_params(tmp_path)
    assert marginalia("stage", "predict") == 0
    assert marginalia("stage", "drift") == 0
    said = atomic.read_json(Path("reports/drift.json"))
    assert said["drifted"] == ["dusk"]
    answers = {dump: said["dumps"][dump]["sources"]["answers"] for dump in ("dusk", "more")}
    assert (answers["dusk"]["drifted"], answers["more"]["drifted"]) == (True, False)  # what it answers moved, too
    with Image.open("reports/drift/unusual.jpg") as page:
        assert page.size[1] > 400
    shifts = {dump: said["dumps"][dump]["shifts"] for dump in ("dusk", "more")}
    assert abs(shifts["dusk"]["confidence"]["deviations"]) > 3 > abs(shifts["more"]["confidence"]["deviations"])
    for side in ("reference", "dump"):
        assert sum(area[side] for area in shifts["dusk"]["area"].values()) == pytest.approx(1, abs=1e-5)
        assert sum(shifts["dusk"]["margins"][side]) == pytest.approx(1, abs=1e-5)
    assert any(area["moved"] for area in shifts["dusk"]["area"].values())
    assert not any(area["moved"] for area in shifts["more"]["area"].values())
