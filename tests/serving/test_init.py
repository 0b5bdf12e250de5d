"""serving: importing the package, or one of its packages, changes nothing in the process."""

import json
import subprocess
import sys

from tests.support.live_server import ROOT

PROGRAM = """
import json, os, sys
variables, modules = dict(os.environ), set(sys.modules)
import serving, serving.bento, serving.http, serving.model, serving.telemetry
print(json.dumps([dict(os.environ) == variables, sorted(set(sys.modules) - modules)]))
"""


def test_importing_the_packages_changes_neither_variables_nor_other_modules() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=ROOT)
    packages = ["serving", "serving.bento", "serving.http", "serving.model", "serving.telemetry"]
    assert json.loads(done.stdout) == [True, packages]
