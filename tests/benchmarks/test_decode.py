"""The bound and the loads of benchmarks/decode.py."""

import numpy as np
import pytest

from benchmarks.decode import BEGIN, STEPS, drawn, least_time, recorded, side_by_side
from data.convert import convert
from data.traces.requests import ordered, requests_of, serve
from data.traces.store import open_trace
from tests.helpers.made_up_requests import EXPERTS, LAYERS, TOP_K, write_recording


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


def test_recorded_requests_write_a_token_each_and_their_layers_stand_side_by_side(tmp_path):
    trace = convert(write_recording(tmp_path / "r.npz"), tmp_path / "trace", slots=4, chunk=16).path
    counts = recorded(trace, EXPERTS * LAYERS, 3 * LAYERS * TOP_K)
    assert counts.shape == (STEPS, 1, EXPERTS * LAYERS)
    assert (counts.reshape(STEPS, LAYERS, EXPERTS).sum(-1) == 3 * TOP_K).all()
    step = list(serve(ordered(requests_of(open_trace(trace)), "shuffled"), 3, 1))[BEGIN]
    routes = np.concatenate([chunk.request.experts[chunk.start : chunk.stop] for chunk in step])
    assert counts[0, 0, :EXPERTS].tolist() == np.bincount(routes[:, 0].ravel(), minlength=EXPERTS).tolist()
    layout = open_trace(trace).layout
    sizes = EXPERTS, EXPERTS * LAYERS, EXPERTS + 1, EXPERTS * (LAYERS + 1)
    assert [side_by_side(layout, size) for size in sizes] == [1, LAYERS, 0, 0]
    with pytest.raises(ValueError, match="too few requests to decode 90 requests at a time"):
        recorded(trace, EXPERTS, 90 * TOP_K)
