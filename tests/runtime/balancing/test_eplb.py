from pathlib import Path

import numpy as np
import pytest

from predictor.baselines.history import LastBatch, Oracle, RunningMean
from predictor.forecast import forecast_from_load
from runtime.balancing.eplb import ContiguousPlanner, EplbPlanner
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.balancing.split import balancedness, device_load, split_evenly

LOADS = np.load(Path(__file__).parents[1] / "recorded" / "dsv2lite.npz")["counts"].astype(np.int64)


def even_balance(planner, forecaster, redundant):
    plan = ReplicationPlan.at_home(contiguous_homes(*LOADS.shape[1:]), 8, redundant)
    balance = []
    for step in range(1, len(LOADS)):
        plan = planner.plan(forecaster.forecast(None, LOADS[:step]), plan, LOADS[:step])
        pairs = zip(LOADS[step], plan.phy2log, strict=True)
        balance.append(balancedness(np.stack([device_load(split_evenly(load, row, 8), 8) for load, row in pairs])))
    return float(np.mean(balance))


@pytest.mark.parametrize(
    ("planner", "forecaster", "redundant", "expected"),
    [
        (ContiguousPlanner(), LastBatch(), 0, 0.688),
        (EplbPlanner(), LastBatch(), 8, 0.879),
        (EplbPlanner(), LastBatch(), 16, 0.883),
        (EplbPlanner(), RunningMean(), 16, 0.795),
        (EplbPlanner(), Oracle(LOADS), 16, 0.992),
    ],
)
def test_another_implementation_on_all_layers_of_these_loads_scored_the_same(planner, forecaster, redundant, expected):
    assert even_balance(planner, forecaster, redundant) == pytest.approx(expected, abs=0.01)


def test_eplb_worked_by_hand():
    # 8 experts, 2 devices, 2 redundant: expert 0 is copied, then expert 1 (90 / 2 = 45 < 48)
    load = np.array([[90.0, 48, 10, 10, 10, 10, 10, 10]])
    bare = ReplicationPlan.at_home(contiguous_homes(1, 8), 2, 2)
    plan = EplbPlanner().plan(forecast_from_load(load, made_at=0, source="truth"), bare, np.zeros((0, 1, 8), dtype=int))
    assert plan.copies.tolist() == [[2, 2, 1, 1, 1, 1, 1, 1]]
    assert sorted(plan.phy2log.reshape(2, 5).tolist()[0]) == sorted([0, 1, 2, 4, 6])


def test_contiguous_changes_nothing():
    bare = ReplicationPlan.at_home(contiguous_homes(5, 64), 8, 0)
    assert ContiguousPlanner().plan(LastBatch().forecast(None, LOADS[:3]), bare, LOADS[:3]) is bare
