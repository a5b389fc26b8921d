from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.baselines.history import LastBatch, Oracle, RunningMean
from predictor.forecast import forecast_from_load
from runtime.balancing.eplb import ContiguousPlanner, EplbPlanner, rebalance_experts
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
    assert plan.replica_count.tolist() == [[2, 2, 1, 1, 1, 1, 1, 1]]
    assert sorted(plan.phy2log.reshape(2, 5).tolist()[0]) == sorted([0, 1, 2, 4, 6])


def test_contiguous_changes_nothing():
    bare = ReplicationPlan.at_home(contiguous_homes(5, 64), 8, 0)
    assert ContiguousPlanner().plan(LastBatch().forecast(None, LOADS[:3]), bare, LOADS[:3]) is bare


README_WEIGHT = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_PHY2LOG = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_example_of_eplbs_readme_with_arrays_and_tensors():
    phy2log, log2phy, logcnt = rebalance_experts(np.array(README_WEIGHT), 16, 4, 2, 8)
    assert phy2log.tolist() == README_PHY2LOG
    assert logcnt[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert log2phy[0, 5].tolist() == [0, 2]
    assert log2phy[0, 0].tolist() == [12, -1]
    tensors = rebalance_experts(torch.tensor(README_WEIGHT), 16, 4, 2, 8)
    for tensor, array in zip(tensors, (phy2log, log2phy, logcnt), strict=True):
        assert isinstance(tensor, torch.Tensor)
        assert tensor.dtype == torch.int64
        assert tensor.tolist() == array.tolist()


def test_groups_that_do_not_divide_over_nodes_use_the_global_policy():
    weight = np.array(README_WEIGHT)
    alone = rebalance_experts(weight, 16, 1, 1, 8)[0]
    assert (rebalance_experts(weight, 16, 3, 2, 8)[0] == alone).all()
    bare = ReplicationPlan.at_home(contiguous_homes(2, 12), 4, 4)
    forecast = forecast_from_load(weight.astype(float), made_at=0, source="truth")
    planned = EplbPlanner().plan(forecast, bare, np.zeros((0, 2, 12), dtype=int)).phy2log
    assert (planned == rebalance_experts(weight, 16, 1, 1, 4)[0]).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]), st.integers(1, 2), st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=60)
def test_groups_stay_on_their_node_and_maps_agree(seed, nodes, groups_each, size, spare):
    experts, gpus = nodes * groups_each * size * 2, nodes * 2
    replicas = experts + spare * gpus
    weight = np.random.default_rng(seed).zipf(1.5, (2, experts)).clip(max=500).astype(float)
    phy2log, log2phy, logcnt = rebalance_experts(weight, replicas, nodes * groups_each, nodes, gpus)
    for layer in range(2):
        group = phy2log[layer].reshape(nodes, -1) // (size * 2)
        homes = [set(row) for row in group]
        assert all(len(held) == groups_each for held in homes)
        assert sum(map(len, homes)) == len(set().union(*homes))
        assert logcnt[layer].sum() == replicas
        for expert in range(experts):
            slots = log2phy[layer, expert, : logcnt[layer, expert]]
            assert (phy2log[layer, slots] == expert).all()


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"num_groups": 5}, "12 experts do not divide over num_groups=5"),
        ({"num_nodes": 3}, "8 GPUs do not divide over num_nodes=3"),
        ({"num_replicas": 15}, "15 replicas do not divide over num_gpus=8"),
        ({"num_replicas": 8}, "num_replicas is 8, expected at least one for each of 12 experts"),
        ({"num_gpus": 0}, "num_gpus is 0, expected at least 1"),
        ({"weight": np.ones(12)}, r"weight has shape \(12,\)"),
        ({"weight": np.full((1, 12), np.nan)}, "weight has NaN"),
    ],
)
def test_numbers_that_do_not_divide_are_refused(changed, text):
    arguments = {"num_replicas": 16, "num_groups": 4, "num_nodes": 2, "num_gpus": 8}
    with pytest.raises(ValueError, match=text):
        rebalance_experts(**{"weight": np.array(README_WEIGHT)} | arguments | changed)
