"""The ablation on a made-up trace: rows in order, each figure of held-out batches alone."""

import numpy as np
import pytest

from benchmarks.ablation import WithoutSpread, figures, planner_of
from data.traces.load_stream import as_stream
from predictor.baselines.history import LastBatch
from runtime.balancing.eplb import EplbPlanner
from runtime.simulate.cost_model import Hardware
from runtime.simulate.forecasters import TrueLoad
from runtime.simulate.replay import Setting, replay

HARDWARE = Hardware(1.0, 1.0, 1.0, 0.0)


def test_figures_are_of_held_out_batches():
    loads = np.random.default_rng(0).multinomial(512, np.full(16, 1 / 16), (12, 2))
    loads[::2, :, 0] += 4000
    first = planner_of("home", (2, 16), 16)
    (outcome,) = replay(TrueLoad("oracle"), {"home": first}, as_stream(loads), Setting(2, 12, ["quota"], HARDWARE))
    held_out = np.arange(2, 12) % 2 == 1
    found = figures(outcome, held_out, np.array(["a", "a", "b", "b", "b"]))
    assert found["balancedness"] == pytest.approx(outcome.balance[1::2].mean(), abs=1e-4)
    assert found["phases"]["a"] == pytest.approx(outcome.balance[[1, 3]].mean(), abs=1e-4)
    assert found["interval"][0] <= found["balancedness"] <= found["interval"][1]


def test_planners_start_without_replicas_and_spread_is_not_told():
    planner, plan = planner_of("eplb", (2, 16), 16)
    assert isinstance(planner, EplbPlanner)
    assert (plan.phy2log >= 0).sum() == 2 * 16
    assert planner_of("contiguous", (2, 16), 16)[1].phy2log.shape == (2, 16)
    history = np.random.default_rng(0).poisson(9, (5, 2, 16))
    assert LastBatch().forecast(None, history).spread.any()
    assert not WithoutSpread(LastBatch(), "last").forecast(None, history).spread.any()
