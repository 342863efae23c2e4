"""Time limits that environments report as terminations."""

import numpy as np
import pytest

from sb3_mpg.common.models.terminations import looks_like_time_limit


@pytest.mark.parametrize(
    "lengths, limit",
    [
        ([59] * 3, 59),
        # Real terminations among them
        ([12, 59, 59, 31, 59, 4], 59),
        # One that ends just before the limit is possible
        ([59] * 10 + [57], 59),
        ([500] * 2, 500),
        ([5] * 7, 5),
        # Too few to tell, the fewer the shorter they are
        ([], None),
        ([59], None),
        ([59, 59], None),
        ([5] * 4, None),
        # A falling pole: few lengths, many of them equal
        ([3, 4] * 20, None),
        ([3, 4, 4, 4, 4, 4, 5, 4, 4], None),
        ([41, 59, 59, 59, 52, 48], None),
    ],
)
def test_looks_like_time_limit(lengths, limit):
    assert looks_like_time_limit(lengths) == limit
    assert looks_like_time_limit(np.array(lengths, dtype=np.int32)) == limit


def test_random_walks_to_a_border_have_no_time_limit():
    """Lengths of episodes that end where a random walk leaves an interval."""
    rng = np.random.default_rng(0)
    for border in (2.0, 5.0, 10.0):
        paths = np.abs(rng.normal(size=(50, 40, 1000)).cumsum(axis=2)) > border
        lengths = paths.argmax(axis=2) + 1
        found = [looks_like_time_limit(group) for group in lengths]
        assert sum(limit is not None for limit in found) <= 1
