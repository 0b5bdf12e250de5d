"""How often a worker was started again, and why: counted by the process that watches it, told to the next worker at its start.

A worker's own counters start at zero with it, as Prometheus expects of a process; this one goes on.
"""

import json
import os

# of a worker's end: the kernel had no memory for it; another signal; it failed; it left, as it does when it lost its model
CAUSES = ("out-of-memory", "killed", "failed", "left")
VARIABLE = "_MARGINALIA_RESTARTS"  # no MARGINALIA_*: those are settings


def stated(restarts: dict[str, int]) -> str:
    """Restarts by cause, as the environment of a worker holds them."""
    return json.dumps(restarts)


def from_environment() -> dict[str, int]:
    """Restarts before this worker, by each of CAUSES; none where nobody has stated any."""
    told = json.loads(os.environ.get(VARIABLE, "{}"))
    return {cause: int(told.get(cause, 0)) for cause in CAUSES}
