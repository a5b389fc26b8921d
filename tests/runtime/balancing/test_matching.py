import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.baselines.history import LastBatch
from predictor.forecast import forecast_from_load
from runtime.balancing.matching import fill
from runtime.balancing.plan import ReplicationPlan, contiguous_homes, flat_homes
from runtime.balancing.planner import HomePlanner
from runtime.balancing.split import balancedness, device_load, split_by_quota, split_load
from runtime.balancing.water_filling import start


def zipf(layers, experts, tokens, seed=0):
    """A Zipf load of exponent .7, `[L, E]`, hot experts elsewhere in each layer."""
    rng = np.random.default_rng(seed)
    share = np.arange(1.0, experts + 1) ** -0.7
    return rng.multinomial(tokens, rng.permuted(np.tile(share / share.sum(), (layers, 1)), axis=1))


def no_history(load):
    return np.zeros((0, *load.shape), dtype=np.int64)


@pytest.mark.parametrize("devices", [64, 128, 256])
def test_one_replica_slot_a_device_is_enough_for_any_load(devices):
    load = zipf(1, 256, 1024 * devices)
    plan = ReplicationPlan.at_home(flat_homes(load.astype(float), devices), devices, devices)
    target = HomePlanner(devices, devices).plan(
        forecast_from_load(load.astype(float), made_at=0, source="truth"), plan, no_history(load)
    )
    assert balancedness(split_load(load, target)).min() >= 0.99


@pytest.mark.parametrize(("devices", "redundant"), [(72, 32), (144, 32), (320, 64)])
def test_geometries_of_deployments_are_planned(devices, redundant):
    load = zipf(2, 256, 1024 * devices)
    plan = ReplicationPlan.at_home(flat_homes(load.astype(float), devices, redundant), devices, redundant)
    bare = balancedness(split_load(load, plan)).mean()
    planner, history = HomePlanner(devices, redundant), no_history(load)
    target = planner.plan(forecast_from_load(load.astype(float), made_at=0, source="truth"), plan, history)
    assert balancedness(split_load(load, target)).mean() > 2 * bare
    assert (target.homes == plan.homes).all()


geometries = st.tuples(
    st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(2, 12), st.integers(0, 2), st.booleans()
)


@given(geometries)
@settings(max_examples=60, deadline=None)
def test_any_geometry_covers_every_expert_and_homes_never_move(case):
    seed, devices, experts, more, known = case
    redundant = -experts % devices + more * devices
    if experts + redundant > experts * devices:
        return
    rng = np.random.default_rng(seed)
    loads = rng.zipf(1.5, (3, 2, experts)).clip(max=900).astype(np.int64)
    homes = flat_homes(loads[0].astype(float), devices, redundant) if known else contiguous_homes(2, experts)
    plan = ReplicationPlan.at_home(homes, devices, redundant)
    assert plan.is_home_slot.sum() == 2 * experts
    for step in (1, 2):
        target = HomePlanner(devices, redundant).plan(LastBatch().forecast(None, loads[:step]), plan, loads[:step])
        assert (target.homes == plan.homes).all()
        assert (np.take_along_axis(target.phy2log, target.homes, axis=-1) == np.arange(experts)).all()
        assert all(move.source == plan.homes[move.layer, move.expert] for move in plan.moves_to(target))
        for block in target.phy2log.reshape(2 * devices, -1):
            assert len(set(block[block >= 0])) == (block >= 0).sum()
        assert (target.filled().homes == plan.homes).all()
        plan = target
    quota = split_by_quota(loads[2, 0], plan.phy2log[0], devices)
    assert device_load(quota, devices).sum() == loads[2, 0].sum()


@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 16, 32]), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_copies_are_limited_and_never_make_the_largest_load_larger(seed, devices, most):
    rng = np.random.default_rng(seed)
    load = rng.zipf(1.5, (2 * devices, 1)).clip(max=300).astype(np.float32)
    load *= devices / load.sum()
    home = np.repeat(np.arange(devices), 2)
    layer = start(np.full(devices, -1), np.arange(devices + 1), home, load, np.zeros(1, dtype=np.float32))
    before = layer.load.max()
    copies = fill(layer, layer.held.copy(), np.float32(0.001), np.ones((devices, devices), dtype=np.float32), most)
    assert (layer.held >= 0).sum() <= copies <= most  # a slot may be filled twice
    assert layer.load.max() <= before + 1e-4
    assert layer.load.sum() == pytest.approx(devices, rel=1e-4)
    held = layer.held >= 0
    assert (home[layer.held[held]] != layer.device[held]).all()


def test_replicas_built_anew_mostly_stay_where_they_are():
    devices, redundant, rng = 72, 32, np.random.default_rng(0)
    logs = -0.7 * np.log(rng.permutation(np.arange(1.0, 257)))[None]
    plan, moves, balance = None, [], []
    for _ in range(20):
        logs = logs + 0.05 * rng.standard_normal(logs.shape)
        load = rng.multinomial(1024 * devices, np.exp(logs) / np.exp(logs).sum())
        if plan is None:
            homes = flat_homes(load.astype(float), devices, redundant)
            plan = ReplicationPlan.at_home(homes, devices, redundant)
        forecast = forecast_from_load(load.astype(float), made_at=0, source="truth")
        target = HomePlanner(devices, redundant).plan(forecast, plan, no_history(load))
        moves.append(len(plan.moves_to(target)))
        plan = target
        balance.append(balancedness(split_load(load, plan)).mean())
    assert np.mean(moves[5:]) <= 5
    assert np.mean(balance[5:]) >= 0.87
