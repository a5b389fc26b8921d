import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.baselines.history import Ema, LastBatch, Oracle
from predictor.forecast import LoadForecast, forecast_from_load
from runtime.balancing import local_search, planner
from runtime.balancing.plan import ReplicationPlan, contiguous_homes, flat_homes
from runtime.balancing.planner import HomePlanner
from runtime.balancing.split import balancedness, device_load, split_by_quota, split_load
from runtime.balancing.water_filling import score, start

FREE = np.zeros(1, dtype=np.float32)
RECORDED = Path(__file__).parents[1] / "recorded"


def run(loads, forecaster, redundant, devices=8, **options):
    """Balancedness of each step and layer, and moves a layer and step, planned from step 1 on."""
    chosen = HomePlanner(devices, redundant, **options)
    homes = flat_homes(loads[0].astype(float), devices)
    plan, balance, moves = ReplicationPlan.at_home(homes, devices, redundant), [], []
    for step in range(1, len(loads)):
        target = chosen.plan(forecaster.forecast(None, loads[:step]), plan, loads[:step])
        moves.append(len(plan.moves_to(target)))
        plan = target
        balance.append(balancedness(split_load(loads[step], plan)))
    return np.array(balance), np.array(moves) / loads.shape[1]


def recorded(name):
    return np.load(RECORDED / f"{name}.npz")["counts"].astype(np.int64)


def multinomial(seed, share, tokens, steps):
    rng = np.random.default_rng(seed)
    return rng.multinomial(tokens, np.tile(share, (steps, 1, 1)))


cases = st.tuples(
    st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4, 8]), st.integers(2, 6), st.integers(0, 2), st.integers(0, 5)
).filter(lambda case: case[1] > 1 or case[3] == 0)


@given(cases, st.sampled_from([None, 0, 3]))
@settings(max_examples=150)
def test_homes_stay_no_device_holds_a_copy_twice_and_budgets_are_kept(case, budget):
    seed, devices, homes_each, replicas, past = case
    rng = np.random.default_rng(seed)
    loads = rng.zipf(1.5, (past + 3, 2, devices * homes_each)).clip(max=900).astype(np.int64)
    chosen = HomePlanner(devices, devices * replicas, max_moves=budget)
    plan = ReplicationPlan.at_home(contiguous_homes(2, devices * homes_each), devices, devices * replicas)
    for step in (past + 1, past + 2):
        forecast = LastBatch().forecast(None, loads[:step])
        target = chosen.plan(forecast, plan, loads[:step])
        assert (target.phy2log == chosen.plan(forecast, plan, loads[:step].copy()).phy2log).all()
        assert (target.homes == plan.homes).all()
        blocks = target.phy2log.reshape(2, devices, -1)
        for block in blocks.reshape(-1, blocks.shape[-1]):
            assert len(set(block[block >= 0])) == (block >= 0).sum()
        moves = plan.moves_to(target)
        assert len(moves) <= (chosen.num_redundant_experts * 2 if budget is None else budget)
        assert all(move.source == plan.homes[move.layer, move.expert] for move in moves)
        plan = target


def test_the_plan_from_the_true_load_is_as_good_as_the_best_of_all_plans():
    rng = np.random.default_rng(5)
    for _ in range(10):
        load = rng.zipf(1.3, (1, 6)).clip(max=300).astype(float)
        bare = ReplicationPlan.at_home(flat_homes(load, 2), 2, 2)
        planned = HomePlanner(2, 2).plan(
            forecast_from_load(load, made_at=1, source="oracle"), bare, np.zeros((0, 1, 6), int)
        )
        others = []
        for first in bare.phy2log[0, 4:7]:
            for second in bare.phy2log[0, 0:3]:
                phy2log = bare.phy2log[0].copy()
                phy2log[[3, 7]] = first, second
                others.append(device_load(split_by_quota(load[0].astype(int), phy2log, 2), 2).max())
        ours = device_load(split_by_quota(load[0].astype(int), planned.phy2log[0], 2), 2).max()
        assert ours <= min(others) + 1 + 0.002 * load.sum()


def test_the_relaxed_score_is_the_load_of_the_exact_split():
    rng = np.random.default_rng(1)
    for _ in range(50):
        home = np.repeat(np.arange(8), 4)
        held = np.array([rng.choice(np.flatnonzero(home != slot // 2)) for slot in range(16)])
        held[1::2] = np.where(held[1::2] == held[::2], -1, held[1::2])
        load = rng.zipf(1.5, 32).clip(max=300) * 100
        layer = start(held, np.arange(0, 17, 2), home, (load / load.sum() * 8).astype(np.float32)[:, None], FREE)
        phy2log = np.concatenate([np.arange(32).reshape(8, 4), held.reshape(8, 2)], axis=1).ravel()
        exact = device_load(split_by_quota(load, phy2log, 8), 8).max() / load.sum() * 8
        assert layer.load.max() == pytest.approx(exact, rel=0.02)
        assert score(layer.load, np.ones(1, dtype=np.float32)) >= exact - 1 - 1e-3


@pytest.mark.parametrize(
    ("name", "redundant", "least"), [("gptoss20b", 8, 0.84), ("gptoss20b", 16, 0.925), ("dsv2lite", 16, 0.985)]
)
def test_balanced_from_history_on_recorded_loads(name, redundant, least):
    balance, moves = run(recorded(name), LastBatch(), redundant)
    assert balance.mean() >= least
    assert moves.mean() < 3


@pytest.mark.parametrize("redundant", [8, 16])
def test_balanced_from_the_truth_on_recorded_loads(redundant):
    loads = recorded("gptoss20b")
    balance, _ = run(loads, Oracle(loads), redundant)
    assert balance.mean() >= 0.99


def test_steady_loads_of_the_real_shape_stay_put():
    share = 1 / np.arange(1, 129) ** 1.2
    rng = np.random.default_rng(0)
    loads = multinomial(1, rng.permuted(np.tile(share / share.sum(), (4, 1)), axis=1), 4096, 20)
    balance, moves = run(loads, Ema(), 16)
    assert balance[3:].mean() >= 0.99
    assert moves[3:].mean() < 1


def plan_hot_expert():
    load = np.zeros((1, 16))
    load[0, 3] = 800
    bare = ReplicationPlan.at_home(contiguous_homes(1, 16), 8, 8)
    forecast = forecast_from_load(load, made_at=1, source="oracle")
    return HomePlanner(8, 8).plan(forecast, bare, load[None].astype(int)), load.astype(int)


def test_one_expert_with_all_tokens_gets_a_copy_on_every_device():
    plan, load = plan_hot_expert()
    assert plan.replica_count[0, 3] == 8
    assert split_load(load, plan).max() == 100


def test_no_load_and_flat_load_move_nothing():
    bare = ReplicationPlan.at_home(contiguous_homes(1, 16), 8, 8)
    for load in (np.zeros((1, 16)), np.full((1, 16), 50.0)):
        forecast = forecast_from_load(load, made_at=1, source="truth")
        assert (
            HomePlanner(8, 8).plan(forecast, bare, np.zeros((0, 1, 16), dtype=int)).phy2log.tolist()
            == bare.phy2log.tolist()
        )


def test_moves_that_do_not_pay_in_time_are_not_made():
    loads = recorded("dsv2lite")[:12]
    moves = [run(loads, LastBatch(), 16, move_tokens=tokens)[1].sum() for tokens in (0, 1e3, 1e9)]
    assert moves[0] > moves[1] > moves[2] == 0


def test_a_budget_goes_to_the_layer_that_gains_most():
    load = np.full((2, 8), 10.0)
    load[1, 0] = 500
    bare = ReplicationPlan.at_home(contiguous_homes(2, 8), 4, 4)
    forecast = forecast_from_load(load, made_at=0, source="truth")
    moves = bare.moves_to(HomePlanner(4, 4, max_moves=1).plan(forecast, bare, np.zeros((0, 2, 8), dtype=int)))
    assert [(move.layer, move.expert) for move in moves] == [(1, 0)]


def test_copies_stay_within_a_node_where_that_is_enough():
    load = np.full((1, 8), 10.0)
    load[0, 6] = 70  # at home on device 3, whose node is devices 2 and 3
    bare = ReplicationPlan.at_home(contiguous_homes(1, 8), 4, 4)
    forecast = forecast_from_load(load, made_at=0, source="truth")
    devices = []
    for node in (None, 2):
        near = HomePlanner(4, 4, max_moves=1, devices_per_node=node)
        moves = bare.moves_to(near.plan(forecast, bare, np.zeros((0, 1, 8), dtype=int)))
        devices.append([bare.device_of(move.slot) for move in moves])
    assert devices == [[0], [2]]


@pytest.mark.parametrize(("between_nodes", "moved"), [(1.0, 1), (4.0, 1), (5e3, 0)])
def test_a_copy_from_another_node_must_save_what_it_costs(between_nodes, moved):
    load = np.full((1, 4), 10.0)
    load[0, 3] = 40
    bare = ReplicationPlan.at_home(contiguous_homes(1, 4), 4, 4)
    forecast = forecast_from_load(load, made_at=0, source="truth")
    planner = HomePlanner(4, 4, max_moves=1, devices_per_node=1, between_nodes=between_nodes)
    assert len(bare.moves_to(planner.plan(forecast, bare, np.zeros((0, 1, 4), dtype=int)))) == moved


def test_compiling_is_announced_once_and_only_where_no_compiled_kernels_are_stored(tmp_path, caplog):
    script = (
        "import logging; logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "from runtime.balancing import local_search, planner\n"
        "planner._announce_compiling(local_search); planner._announce_compiling(local_search)"
    )
    empty = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=empty)
    assert done.stderr.strip() == "compiling the planner's kernels, once per machine; this takes some seconds"
    plan_hot_expert()  # from here on they are stored
    with caplog.at_level("INFO"):
        planner._announce_compiling.__wrapped__(local_search)
    assert not caplog.records


def test_a_forecast_that_admits_errors_is_hedged_and_a_sure_one_is_not():
    loads = recorded("gptoss20b")[:20]
    truth = Oracle(loads).forecast(None, loads[:10])
    unsure = LoadForecast(truth.share, truth.tokens, truth.share, 10, "unsure")
    bare = ReplicationPlan.at_home(flat_homes(loads[0].astype(float), 8), 8, 16)
    plans = [HomePlanner(8, 16).plan(forecast, bare, loads[:10]) for forecast in (truth, unsure)]
    later = [balancedness(np.stack([split_load(load, plan) for load in loads[11:]])).mean() for plan in plans]
    assert later[1] > later[0]
    assert balancedness(split_load(loads[10], plans[0])).mean() >= 0.99


@pytest.mark.parametrize("value", [np.nan, -0.1])
def test_forecasts_that_are_no_loads_are_refused_by_name(value):
    with pytest.raises(ValueError, match="forecast 'broken': share has NaN, infinite or negative entries"):
        LoadForecast(np.array([[value, 1.0]]), np.ones(1), np.zeros((1, 2)), 0, "broken")


def test_what_does_not_fit_together_is_refused():
    loads = np.ones((3, 2, 8), dtype=np.int64)
    bare = ReplicationPlan.at_home(contiguous_homes(2, 8), 4, 4)
    forecast = LastBatch().forecast(None, loads)
    with pytest.raises(ValueError, match="the plan is for 4 devices and 4 redundant experts, the planner for 2 and 4"):
        HomePlanner(2, 4).plan(forecast, bare, loads)
    with pytest.raises(ValueError, match=r"forecast 'last' is \(1, 8\), the plan is for \(2, 8\)"):
        HomePlanner(4, 4).plan(LastBatch().forecast(None, loads[:, :1]), bare, loads)
    with pytest.raises(ValueError, match="recent loads have shape"):
        HomePlanner(4, 4).plan(forecast, bare, loads[0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_redundant_experts": -1}, "4 devices and -1 redundant experts"),
        ({"max_moves": -1}, "max_moves is -1"),
        ({"expert_overhead_tokens": -1}, "expert_overhead_tokens is -1, expected 0 or more"),
        ({"devices_per_node": 3}, "devices_per_node is 3, which does not divide 4 devices"),
        ({"between_nodes": 0.5}, "between_nodes is 0.5, expected a finite number, 1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        HomePlanner(**{"num_devices": 4, "num_redundant_experts": 4} | options)
