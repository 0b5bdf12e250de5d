"""Importing changes nothing in the process; building a network does what timm needs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def fresh(program):
    """Run `program` in a new interpreter; returns what it printed."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


REGISTERED = "any(name.startswith('torchvision::') for name in torch._C._dispatch_get_all_op_names())"


def test_importing_training_and_its_modules_registers_no_operator_and_imports_no_network_library():
    program = (
        "import sys, torch, training, training.models.segmenter, training.engine.trainer, training.evaluate\n"
        f"print({REGISTERED}, 'timm' in sys.modules, 'segmentation_models_pytorch' in sys.modules)"
    )
    assert fresh(program) == "False False False"


def test_a_network_can_be_built_in_a_fresh_process_and_twice():
    program = (
        "import torch\n"
        "from tests.support import tiny_settings\n"
        "from training.models import segmenter, torchvision_operators\n"
        "for _ in range(2):\n"
        "    model = segmenter.build(tiny_settings.model(encoder='resnet10t', weights=None), 3).eval()\n"
        f"print(tuple(model(torch.zeros(1, 3, 64, 96)).shape), {REGISTERED})\n"
        "import torchvision\n"
    )
    assert fresh(program) == "(1, 3, 64, 96) True"
