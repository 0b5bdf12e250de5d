"""Several processes find what one would: two gloo processes under torchrun against the same code alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import tiny_settings
from tests.support.training import two_ranks
from training.engine import distributed
from training.methods import student
from training.models import segmenter

pytestmark = pytest.mark.slow  # two processes under torchrun

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(what two processes found, what one finds)."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, two_ranks.__file__, str(folder / "two.pt")],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "two.pt", weights_only=True), two_ranks.together(distributed.SINGLE, folder)


def test_the_quantile_over_ranks_is_that_of_the_whole_batch(both):
    two, one = both
    assert two["quantile"] == one["quantile"]


def test_class_maxima_over_ranks_are_those_of_the_whole_batch(both):
    two, one = both
    assert two["class_max"] == one["class_max"]


def test_validation_over_ranks_counts_every_image_once(both):
    two, one = both
    assert two["miou"] == one["miou"]


@pytest.mark.parametrize("method", two_ranks.METHODS)
def test_gradients_over_ranks_are_those_of_the_whole_batch(both, method):
    """Although one half holds more valid and more kept pixels than the other."""
    two, one = (found["gradients"][method] for found in both)
    for name, gradient in one.items():
        assert torch.allclose(two[name], gradient, rtol=1e-4, atol=1e-7), name
        assert gradient.abs().max() > 0


def test_ranks_stay_one_model(both):
    two, _ = both
    assert two["apart"] == 0
    assert two["teachers_apart"] == 0
    assert 0 <= two["kept"] <= 1


def test_a_notice_to_one_rank_stops_all_at_one_step_and_the_run_goes_on_from_there(both):
    two, _ = both
    assert "told to stop at step 4; the state is in" in two["told"]
    assert two["resumed_alike"]
    assert two["histories"][0] == two["histories"][1]


def test_batches_shared_over_ranks_leave_the_network_as_it_was():
    """torch's own conversion would drop the activations that timm keeps inside its BatchNorm."""
    torch.manual_seed(0)
    model = segmenter.build(tiny_settings.model(weights=None), 3)
    image = 255 * torch.rand(1, 3, 64, 96)
    before, names = model.eval()(image), list(model.state_dict())
    shared = distributed.share_batches(student.Student(model)).eval()
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in shared.modules())
    assert torch.equal(shared(image, student.Rows(1)).labelled, before)
    assert list(model.state_dict()) == names
