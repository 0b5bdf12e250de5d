"""serving.bento.usage: BentoML's tracking is off, also where its command line was there first."""

import os
import subprocess
import sys

import pytest

from tests.support.live_server import ROOT

AFTERWARDS = """
from bentoml._internal.utils.analytics import usage_stats
print(usage_stats.do_not_track())
"""


def last_line_of(program: str) -> str:
    """Last line of a process whose variables say nothing of tracking: the program, then BentoML's own word on it."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("BENTOML_")}
    done = subprocess.run(
        [sys.executable, "-c", program + AFTERWARDS],
        capture_output=True, text=True, check=True, cwd=ROOT, env=variables,
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


def test_bentoml_tracks_unless_it_is_turned_off() -> None:
    assert last_line_of("") == "False"


def test_it_is_turned_off_after_bentoml_has_read_the_variable() -> None:
    program = "from serving.bento.usage import turn_off_tracking\nturn_off_tracking()"
    assert last_line_of(program) == "True"
    assert last_line_of(AFTERWARDS + program) == "True"


@pytest.mark.parametrize(
    "entry",
    [
        "import serving.bento.service",
        "import serving.bento.packed",
        "from serving.bento import run\ntry: run.main(bundle='absent')\nexcept run.StartError: pass",
        "from serving.bento import build\ntry: build.build('absent')\nexcept ValueError: pass",
    ],
)
def test_every_entry_point_turns_it_off(entry: str) -> None:
    assert last_line_of(entry) == "True"
