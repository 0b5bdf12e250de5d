"""The service inside a bento: it serves the bundle that lies beside this package, whatever the environment names."""

import os
from pathlib import Path

from serving.settings import PREFIX

# Set before serving.bento.service reads it, and absolute: BentoML loads a bento in a parent process and again in its worker,
# with different working directories.
os.environ[PREFIX + "BUNDLE"] = str(Path(__file__).absolute().parents[2] / "bundle")

from serving.bento.service import Marginalia

__all__ = ["Marginalia"]
