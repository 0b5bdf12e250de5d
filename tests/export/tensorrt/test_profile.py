"""export.tensorrt.profile: every size that the input policy makes is in it, and what is not is named."""

import numpy as np
import pytest

from export.tensorrt.profile import Profile
from pipeline.imaging import resize


@pytest.mark.parametrize(
    ("long_side", "stride", "opt", "largest"),
    [(1024, 32, (768, 1024), 1024), (100, 32, (96, 128), 128), (8, 32, (32, 32), 32), (96, 32, (96, 96), 96)],
)
def test_profile_holds_all_that_the_policy_makes(
    long_side: int, stride: int, opt: tuple[int, int], largest: int
) -> None:
    profile = Profile.of(long_side=long_side, stride=stride, max_batch=4)
    assert profile.min_NHW == (1, stride, stride)
    assert profile.opt_NHW == (1, *opt)
    assert profile.max_NHW == (4, largest, largest)
    rng = np.random.default_rng(0)
    for height, width in [(1, 1), (1, 5000), (5000, 1), *rng.integers(1, 3000, (200, 2)).tolist()]:
        plan = resize.plan(height, width, long_side=long_side, stride=stride)
        for batch in (1, 4):
            profile.check((batch, plan.padded_height, plan.padded_width))


def test_profile_names_the_bound() -> None:
    profile = Profile.of(long_side=64, stride=16, max_batch=4)
    for shape, said in {
        (5, 64, 64): "batch 5 is above the engine's largest, 4",
        (0, 64, 64): "batch 0 is below the engine's smallest, 1",
        (1, 80, 64): "height 80 is above the engine's largest, 64",
        (1, 64, 0): "width 0 is below the engine's smallest, 16",
        (1, 64, 40): "width 40 is not a multiple of 16",
    }.items():
        with pytest.raises(ValueError, match=said):
            profile.check(shape)
    with pytest.raises(ValueError, match="must rise"):
        Profile.of(long_side=64, stride=16, max_batch=1, opt_batch=2)
    with pytest.raises(ValueError, match="multiples of 16"):
        Profile(16, (1, 16, 16), (1, 30, 32), (1, 64, 64))
