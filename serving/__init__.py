"""The served model. BentoML's usage tracking is off here, also for a user who runs `bentoml serve` by hand."""

import os
import sys

os.environ["BENTOML_DO_NOT_TRACK"] = "true"  # only this word counts
# Started as `bentoml serve`, its command line has asked, and cached "do track", before this package is imported.
_usage = sys.modules.get("bentoml._internal.utils.analytics.usage_stats")
if _usage is not None:
    _usage.do_not_track.cache_clear()
