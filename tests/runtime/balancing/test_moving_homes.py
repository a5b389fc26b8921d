"""Plans whose homes move: valid for any geometry, few moves, better than fixed homes where replica slots are few."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.baselines.history import LastBatch, Oracle
from predictor.forecast import forecast_from_load
from runtime.balancing import Balancer, HomePlanner, ReplicationPlan
from runtime.balancing.plan import contiguous_homes, flat_homes
from runtime.balancing.plan_file import load_plan, save_plan
from runtime.balancing.split import balancedness, split_load


def drifting(devices, steps, layers=2, experts=256):
    """Zipf loads of exponent .7 whose log shares move by .05 a step, `[N, L, E]`."""
    rng = np.random.default_rng(0)
    logs = -0.7 * np.log(rng.permuted(np.tile(np.arange(1.0, experts + 1), (layers, 1)), axis=1))
    loads = []
    for _ in range(steps):
        logs = logs + 0.05 * rng.standard_normal(logs.shape)
        share = np.exp(logs)
        loads.append(rng.multinomial(1024 * devices, share / share.sum(-1, keepdims=True)))
    return np.stack(loads)


def replay(planner, loads, forecaster):
    """Balancedness and moves a layer of each step from the second on."""
    devices, redundant = planner.num_devices, planner.num_redundant_experts
    plan = ReplicationPlan.at_home(flat_homes(loads[0].astype(float), devices, redundant), devices, redundant)
    balance, moves = [], []
    for step in range(1, len(loads)):
        target = planner.plan(forecaster.forecast(None, loads[:step]), plan, loads[:step])
        moves.append(len(plan.moves_to(target)) / loads.shape[1])
        plan = target
        balance.append(balancedness(split_load(loads[step], plan)).mean())
    return np.array(balance), np.array(moves)


@pytest.mark.parametrize(("devices", "gain", "most"), [(72, 0.02, 7), (144, 0.001, 5)])
def test_few_replica_slots_balance_better_where_homes_move(devices, gain, most):
    loads = drifting(devices, 14)
    fixed, _ = replay(HomePlanner(devices, 32), loads, Oracle(loads))
    moving, moves = replay(HomePlanner(devices, 32, moving_homes=True), loads, Oracle(loads))
    assert moving[5:].mean() >= fixed[5:].mean() + gain
    assert moves[5:].mean() <= most


geometries = st.tuples(
    st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(2, 12), st.integers(0, 2), st.sampled_from([None, 1, 4]),
    st.sampled_from([0, 5]),
)  # fmt: skip


@given(geometries)
@settings(max_examples=80, deadline=None)
def test_every_expert_keeps_a_home_no_device_holds_it_twice_and_budgets_are_kept(case):
    seed, devices, experts, more, budget, price = case
    redundant = -experts % devices + more * devices
    if experts + redundant > experts * devices:
        return
    loads = np.random.default_rng(seed).zipf(1.5, (4, 2, experts)).clip(max=900).astype(np.int64)
    planner = HomePlanner(devices, redundant, budget, expert_overhead_tokens=price, moving_homes=True)
    plan = ReplicationPlan.at_home(contiguous_homes(2, experts), devices, redundant)
    for step in (1, 2, 3):
        forecast = LastBatch().forecast(None, loads[:step])
        target = planner.plan(forecast, plan, loads[:step])
        assert (target.phy2log == planner.plan(forecast, plan, loads[:step]).phy2log).all()
        assert target.is_home_slot.sum() == 2 * experts
        assert (np.take_along_axis(target.phy2log, target.homes, axis=-1) == np.arange(experts)).all()
        moves = plan.moves_to(target)
        assert budget is None or len(moves) <= budget
        size = plan.slots_per_device
        for move in moves:
            first = move.slot // size * size
            assert move.expert not in plan.phy2log[move.layer, first : first + size]
            assert plan.phy2log[move.layer, move.source] == move.expert
        for block in target.phy2log.reshape(2 * devices, -1):
            assert len(set(block[block >= 0])) == (block >= 0).sum()
        plan = target


def test_without_replica_slots_two_experts_are_exchanged():
    load = np.array([[900.0, 700, 300, 100]])
    plan = ReplicationPlan.at_home(contiguous_homes(1, 4), 2, 0)
    forecast = forecast_from_load(load, made_at=0, source="truth")
    target = HomePlanner(2, 0, moving_homes=True).plan(forecast, plan, np.zeros((0, 1, 4), dtype=np.int64))
    assert balancedness(split_load(load.astype(int), target)).tolist() == [1.0]
    assert len(plan.moves_to(target)) == 2


def test_a_balancer_takes_it_and_its_plan_is_read_back_with_its_homes(tmp_path):
    balancer = Balancer(8, 8, "last", planner=HomePlanner(8, 8, moving_homes=True))
    for load in drifting(8, 4, experts=16):
        plan = balancer.step(load)
    assert (plan.homes != ReplicationPlan.at_home(contiguous_homes(2, 16), 8, 8).homes).any()
    save_plan(tmp_path / "plan.json", plan)
    assert (load_plan(tmp_path / "plan.json").plan.homes == plan.homes).all()
