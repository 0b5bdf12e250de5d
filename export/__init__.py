"""Student to bundle, and bundle to answers. The runtimes' reports to their makers are off here, before any is imported."""

import os
import sys

# ONNX Runtime from 1.29 on sends session and model facts unless this is set before it starts; it keeps a device id in
# ~/.cache too (its pull requests 27379 and 29843).
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# OpenVINO sends "import" to an analytics service when it is imported, and keeps an id in ~/intel. It has no variable for
# it but takes its own stub where its telemetry package is absent.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
