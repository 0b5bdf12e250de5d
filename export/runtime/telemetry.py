"""The runtimes' reports to their makers, turned off.

Importing this package changes nothing in the process. Whoever is about to import `onnxruntime` or `openvino` calls
`turn_off` first; both read what it sets when they start and not again.
"""

import os
import sys


def turn_off() -> None:
    """Keep ONNX Runtime and OpenVINO from reporting home. Call it before their first import; calling it again is harmless."""
    # ONNX Runtime from 1.29 on sends session and model facts unless this is set before it starts; it keeps a device id in
    # ~/.cache too (its pull requests 27379 and 29843).
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"

    # OpenVINO sends "import" to an analytics service when it is imported, and keeps an id in ~/intel. It has no variable
    # for it but takes its own stub where its telemetry package is absent.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
