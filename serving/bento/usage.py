"""BentoML's reports of its use to its makers. Each entry point (service, run, build) turns them off."""

import os
import sys


def turn_off_tracking() -> None:
    """Make BentoML send nothing from this process and those that it starts."""
    os.environ["BENTOML_DO_NOT_TRACK"] = "true"  # only this word counts

    # Where a user has typed `bentoml serve`, its command line has read the variable already, and kept "do track".
    usage_stats = sys.modules.get("bentoml._internal.utils.analytics.usage_stats")
    if usage_stats is not None:
        usage_stats.do_not_track.cache_clear()
