"""Few-moves placement against EPLB's own, whose tokens are split evenly over copies too."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.balancing.eplb import place_experts
from runtime.balancing.few_moves import rebalance
from runtime.balancing.planner import LEAST_GAIN


def device_loads(weight, phy2log, devices):
    """Load of each device under an even split, `[L, G]`, by a plain loop."""
    loads = np.zeros((len(weight), devices))
    for layer, row in enumerate(phy2log):
        for slot, expert in enumerate(row):
            loads[layer, slot * devices // len(row)] += weight[layer, expert] / (row == expert).sum()
    return loads


def cost(weight, phy2log, current, devices):
    """Largest device load of each layer over the mean, and the price of the moves, `[L]`."""
    mean = np.maximum(weight.sum(-1) / devices, 1e-12)
    return device_loads(weight, phy2log, devices).max(-1) / mean + LEAST_GAIN * (phy2log != current).sum(-1)


@st.composite
def placements(draw):
    """Loads, a placement to begin with, and numbers that divide."""
    devices, size = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    slots = devices * size
    experts = draw(st.integers(size, slots))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = rng.zipf(1.4, (2, experts)).clip(max=5000).astype(float) * draw(st.sampled_from([0, 1, 1e-9, 1e9]))
    current = np.stack([rng.permutation(np.arange(slots) % experts) for _ in range(2)])
    empty = draw(st.integers(0, slots - experts))
    for row in current:
        spare = np.flatnonzero(np.arange(slots) >= 0)[:0]
        counts = np.bincount(row, minlength=experts)
        for slot in range(slots):
            if len(spare) < empty and counts[row[slot]] > 1:
                counts[row[slot]] -= 1
                spare = np.append(spare, slot)
        row[spare] = -1
    return weight, current, devices


@given(placements())
def test_rules_hold_and_no_solution_of_eplb_costs_less(case):
    weight, current, devices = case
    placed = rebalance(weight, current.shape[1], devices, current)
    assert placed.dtype == np.int64
    for row in placed:
        assert set(row) == set(range(weight.shape[1]))
        for block in row.reshape(devices, -1):
            assert len(set(block)) == len(block)
    anew = place_experts(weight, current.shape[1], 1, 1, devices)
    distinct = np.array([all(len(set(b)) == len(b) for b in row.reshape(devices, -1)) for row in anew])
    ours, theirs = (cost(weight, p, current, devices) for p in (placed, anew))
    assert (ours <= theirs + 1e-9)[distinct].all()


@given(placements())
def test_a_second_call_moves_nothing_more_than_pays(case):
    weight, current, devices = case
    placed = rebalance(weight, current.shape[1], devices, current)
    again = rebalance(weight, current.shape[1], devices, placed)
    before, after = (cost(weight, p, placed, devices) for p in (placed, again))
    assert (after <= before + 1e-9).all()


def test_the_example_moves_two_experts():
    placed = rebalance(np.array([[60.0, 10, 10, 20]]), 6, 2, np.array([[0, 1, 2, 3, 1, 2]]))
    assert placed.tolist() == [[0, 1, 3, 3, 0, 2]]


def test_without_a_placement_it_places_anew_and_is_no_worse_than_eplb():
    weight = np.random.default_rng(0).zipf(1.3, (4, 32)).clip(max=4000).astype(float)
    ours, theirs = rebalance(weight, 48, 8), place_experts(weight, 48, 1, 1, 8)
    assert (device_loads(weight, ours, 8).max(-1) <= device_loads(weight, theirs, 8).max(-1) + 1e-9).all()


def test_experts_stay_in_their_node_where_groups_divide_over_nodes():
    weight = np.random.default_rng(1).zipf(1.5, (3, 16)).clip(max=900).astype(float)
    current = place_experts(np.ones((3, 16)), 24, 4, 2, 4)
    placed = rebalance(weight, 24, 4, current, num_groups=4, num_nodes=2)
    for row in placed:
        nodes = [set(half // 4) for half in row.reshape(2, -1)]  # groups of four experts
        assert nodes[0].isdisjoint(nodes[1])


def test_an_expert_that_nothing_holds_is_placed():
    current = np.array([[0, 1, -1, 1]])
    placed = rebalance(np.array([[1.0, 2, 3]]), 4, 2, current)
    assert set(placed[0]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("weight", "slots", "devices", "current", "said"),
    [
        ([1.0], 2, 1, None, r"weight has shape \(1,\)"),
        ([[np.nan, 1]], 2, 1, None, "NaN, infinite or negative"),
        ([[1.0, 1]], 3, 2, None, "3 replicas do not divide over num_gpus=2"),
        ([[1.0, 1]], 6, 2, None, "3 slots a device are more than the 2 experts; choose at most 2 redundant experts"),
        ([[1.0, 1]], 2, 2, [[0, 1, 1]], r"has shape \(1, 3\), expected \(1, 2\)"),
        ([[1.0, 1]], 2, 2, [[0, 7]], "holds 0 to 7, expected -1 to 1"),
    ],
)
def test_what_cannot_be_placed_is_refused(weight, slots, devices, current, said):
    with pytest.raises(ValueError, match=said):
        rebalance(np.array(weight), slots, devices, None if current is None else np.array(current))
