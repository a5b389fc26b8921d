"""The bound and the loads of benchmarks/decode.py."""

import numpy as np
import pytest

from benchmarks.decode import drawn, least_time


def test_tokens_choose_different_experts():
    counts = drawn(2, 16, 10, 4)
    assert (counts.sum(-1) == 40).all()
    assert counts.max() <= 10


@pytest.mark.parametrize(
    ("counts", "price", "least"),
    [
        ([4, 4, 4, 4], 10, 28),  # two slots on each of two devices
        ([4, 4, 4, 0], 10, 22),  # three active slots on two devices: two on one of them
        ([60, 0, 0, 0], 10, 40),  # one expert on both devices
        ([9, 0, 0, 0], 10, 19),  # not worth a second slot; a bound of 2 slots is 10 + 9 / 2
    ],
)
def test_no_placement_is_below_the_bound(counts, price, least):
    assert least_time(np.array(counts), 2, price) == pytest.approx(least, abs=4)
    assert least_time(np.array(counts), 2, price) <= least
