import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.baselines.history import Ema, LastBatch
from runtime.balancing import Balancer, EplbPlanner, HomePlanner, ReplicationPlan, balancedness
from runtime.balancing.balancer import HISTORY
from runtime.balancing.plan import contiguous_homes, flat_homes
from runtime.balancing.split import split_by_quota, split_load

LOADS = np.load(Path(__file__).parents[1] / "recorded" / "gptoss20b.npz")["counts"].astype(np.int64)


def test_its_steps_are_the_ten_lines_it_stands_for():
    loads = LOADS[:20]
    plan = ReplicationPlan.at_home(flat_homes(loads[0].astype(float), 8), 8, 16)
    planner, balancer = HomePlanner(8, 16), Balancer(8, 16)
    for step in range(1, len(loads)):
        before = plan
        plan = planner.plan(Ema().forecast(None, loads[:step]), plan, loads[:step])
        assert (balancer.step(loads[step - 1]).phy2log == plan.phy2log).all()
        assert balancer.moves == before.moves_to(plan)
    assert (balancer.history == loads[:-1]).all()


def test_it_balances_recorded_loads():
    balancer, balance = Balancer(8, 16), []
    for load, following in pairwise(LOADS):
        balance.append(balancedness(split_load(following, balancer.step(load))).mean())
    assert np.mean(balance) == pytest.approx(0.966, abs=0.001)


def test_tensors_lists_and_arrays_are_the_same_load():
    for load in (LOADS[0], LOADS[0].astype(float), torch.from_numpy(LOADS[0]), LOADS[0].tolist()):
        balancer = Balancer(8, 8, "last")
        balancer.step(load)
        assert (balancer.history[0] == LOADS[0]).all()


def test_a_forecaster_that_learns_observes_every_load_with_its_tokens():
    class Learning(LastBatch):
        def observe(self, upcoming, load, sequences=None):
            observed.append((upcoming, load.tolist()))

    observed, balancer = [], Balancer(8, 8, Learning())
    for load, upcoming in zip(LOADS[:3], ("tokens of 1", "tokens of 2", "tokens of 3"), strict=True):
        balancer.step(load, upcoming)
    balancer.observe(LOADS[3])
    balancer.observe(LOADS[4])
    tokens = (None, "tokens of 1", "tokens of 2", "tokens of 3", None)
    assert observed == [(upcoming, load.tolist()) for upcoming, load in zip(tokens, LOADS, strict=False)]


def test_the_history_is_bounded():
    balancer = Balancer(2, 2)
    for step in range(HISTORY + 5):
        balancer.observe([[step, 1, 2, 3]])
    assert len(balancer.history) == HISTORY
    assert balancer.history[-1, 0, 0] == HISTORY + 4


def test_homes_may_be_given_and_stay():
    balancer = Balancer(8, 8, homes=contiguous_homes(*LOADS.shape[1:]))
    first = balancer.plan
    assert first.replica_count.max() == 1
    for load in LOADS[:5]:
        assert (balancer.step(load).homes == first.homes).all()


def test_a_forecast_from_elsewhere_makes_the_plan_current():
    balancer = Balancer(8, 8, homes=contiguous_homes(*LOADS.shape[1:]))
    bare = balancer.plan
    forecast = LastBatch().forecast(None, LOADS[:3])
    plan = balancer.plan_for(forecast, LOADS[:3])
    assert balancer.plan is plan
    assert (plan.phy2log == HomePlanner(8, 8).plan(forecast, bare, LOADS[:3]).phy2log).all()
    assert balancer.moves == bare.moves_to(plan)


def test_other_planners_can_be_used():
    balancer = Balancer(8, 16, "last", planner=EplbPlanner())
    assert (balancer.step(LOADS[0]).replica_count.sum(-1) == LOADS.shape[2] + 16).all()


@given(st.integers(0, 12))
@settings(max_examples=10)
def test_max_moves_bounds_every_step(most):
    balancer = Balancer(8, 16, "last", max_moves=most)
    for load in LOADS[:6]:
        balancer.step(load)
        assert len(balancer.moves) <= most


def test_devices_per_node_reaches_planner_and_split():
    load = np.full((1, 8), 10)
    load[0, 6] = 90  # at home on device 3; its node is devices 2 and 3
    balancer = Balancer(4, 4, "last", homes=contiguous_homes(1, 8), max_moves=1, devices_per_node=2)
    balancer.observe(load)
    balancer.step(load)  # two equal loads: a forecast without spread
    assert [balancer.plan.device_of(move.slot) for move in balancer.moves] == [2]
    phy2log = np.array([[0, -1, 1, -1, 2, 0, 3, -1]])
    balancer._plan = ReplicationPlan(phy2log, 4)
    counts = np.zeros((4, 4), dtype=int)
    counts[1, 0], counts[3, 0] = 10, 10  # copies of expert 0 on devices 0 and 2, its tokens on devices 1 and 3
    counts[2, 0] = 4
    near = balancer.split(0, counts)
    assert (near == split_by_quota(counts, phy2log[0], 4, devices_per_node=2)).all()
    assert near[1, 0] == 10


def test_groups_reach_homes_and_planner():
    balancer = Balancer(8, 8, "last", devices_per_node=4, num_groups=4)
    for load in LOADS[:5]:
        plan = balancer.step(load)
        node = np.where(plan.phy2log >= 0, plan.phy2log // 8, -1).reshape(len(load), 2, -1)  # groups of 8 experts
        assert all(not set(first) & set(second) - {-1} for first, second in node)
    assert (plan.phy2log.reshape(len(load), 8, -1)[..., -1] >= 0).any()
    with pytest.raises(ValueError, match="layer 0: expert 2 of group 0 is on node 1"):
        Balancer(8, 8, homes=np.arange(32).reshape(8, 4).T.reshape(1, 32), devices_per_node=4, num_groups=4)
    with pytest.raises(ValueError, match="4 groups of experts stay on their nodes, and devices_per_node is not given"):
        Balancer(8, 8, num_groups=4)


def test_the_price_of_an_active_expert_reaches_planner_and_split():
    balancer = Balancer(8, 16, "last", expert_overhead_tokens=64)
    planner, plan = HomePlanner(8, 16, expert_overhead_tokens=64), None
    for step in range(1, 6):
        before = balancer.step(LOADS[step - 1]) if plan is None else plan
        plan = planner.plan(LastBatch().forecast(None, LOADS[: step + 1]), before, LOADS[: step + 1])
        assert (balancer.step(LOADS[step]).phy2log == plan.phy2log).all()
    quota = split_by_quota(LOADS[6, 0], plan.phy2log[0], 8, expert_overhead_tokens=64)
    assert (balancer.split(0, LOADS[6, 0]) == quota).all()
    assert (quota != split_by_quota(LOADS[6, 0], plan.phy2log[0], 8)).any()


@pytest.mark.parametrize(
    ("load", "text"),
    [
        ([1, 2, 3, 4], r"the load has shape \(4,\), expected \[layers, experts\]"),
        ([[1.5, 2, 3, 4]], "is not whole numbers of tokens"),
        ([[np.nan, 2, 3, 4]], "is not whole numbers of tokens"),
        ([[-1, 2, 3, 4]], "the load holds -1; tokens cannot be negative"),
        ([[1, 2, 3]], "3 experts and 2 redundant experts do not divide over 2 devices"),
    ],
)
def test_what_is_no_load_is_refused(load, text):
    with pytest.raises(ValueError, match=text):
        Balancer(2, 2).step(load)


def test_a_load_of_another_model_is_refused():
    balancer = Balancer(2, 2)
    balancer.step([[1, 2, 3, 4]])
    with pytest.raises(ValueError, match=r"the load has shape \(2, 4\), the plan is for \(1, 4\) layers and experts"):
        balancer.step([[1, 2, 3, 4]] * 2)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="there is no plan yet: call step or observe with a first load, or give homes"):
        _ = Balancer(2, 2).plan
    with pytest.raises(ValueError, match="forecaster is 'tea', expected last, ema, mean or an object"):
        Balancer(2, 2, "tea")
    with pytest.raises(ValueError, match="max_moves is an option of the default planner"):
        Balancer(2, 2, planner=EplbPlanner(), max_moves=1)
    with pytest.raises(ValueError, match="devices_per_node is 3, which does not divide 4 devices"):
        Balancer(4, devices_per_node=3)


def test_balancing_loads_no_torch():
    script = (
        "import sys, numpy as np, runtime.balancing as b\n"
        "balancer = b.Balancer(2, 2)\n"
        "plan = balancer.step(np.array([[9, 1, 1, 1]]))\n"
        "b.split_by_quota([9, 1, 1, 1], plan.phy2log[0], 2); b.rebalance_experts(np.ones((1, 4)), 6, 1, 1, 2)\n"
        "[getattr(b, name) for name in b.__all__]\n"
        "print(sorted({'torch', 'transformers', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("load", [[[1e30] * 32], [[2**62] * 32]])
def test_loads_that_no_int64_can_add_up_are_refused_and_not_remembered(load):
    balancer = Balancer(8, 8)
    balancer.step(np.ones((1, 32), dtype=np.int64))
    with pytest.raises(ValueError, match=r"the counts add up to .* tokens, expected at most 9007199254740992"):
        balancer.step(load)
    balancer.step(np.ones((1, 32), dtype=np.int64))
    with pytest.raises(ValueError, match=r"the counts add up to 1\.2e"):
        balancer.split(0, np.array([4 * 10**18] * 3 + [0] * 29))
