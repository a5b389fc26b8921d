import numpy as np

from benchmarks.planner import folded, replay
from benchmarks.support.greedy import GreedyPlanner
from predictor.baselines.history import Oracle


def test_recorded_layers_stand_side_by_side_and_then_later_steps_of_them():
    counts = np.arange(2 * 3 * 4 * 2).reshape(6, 4, 2)
    side = folded(counts, 10, 1)
    assert side.shape == (3, 1, 10)
    assert side[1, 0].tolist() == [*counts[1].ravel(), *counts[4, 0]]
    assert folded(counts, 4, int(1e6)).sum(-1).mean() > 9e5


def test_the_greedy_rival_balances_with_fixed_homes_and_keeps_copies_in_their_slots():
    share = np.random.default_rng(0).permutation(np.arange(1.0, 65) ** -0.7)
    loads = np.tile(np.rint(4e4 * share / share.sum()).astype(np.int64), (9, 1, 1))
    found = replay(loads, GreedyPlanner(), 16, 16, Oracle(loads))
    assert found["from_empty"] > 0.95
    assert found["first_moves"] > 0
    assert found["moves"] == 0
