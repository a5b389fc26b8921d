import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from predictor.baselines.history import Oracle
from runtime.balancing.plan import ReplicationPlan, flat_homes
from runtime.balancing.planner import HomePlanner
from runtime.balancing.split import split_by_quota


def time_of(quotas, devices, price):
    """Time of the slowest device."""
    quota_GP = quotas.sum(0).reshape(devices, -1)
    return int((quota_GP + price * (quota_GP > 0)).sum(-1).max())


def least_time(counts, phy2log, devices, price):
    """The smallest possible time of the slowest device, tokens divisible: the mixed-integer program."""
    slots, experts = len(phy2log), len(counts)
    held = phy2log >= 0
    whole = np.zeros((experts, 2 * slots + 1))
    whole[phy2log[held], np.flatnonzero(held)] = 1
    active = np.hstack([np.eye(slots), -np.eye(slots) * np.where(held, counts[phy2log], 0), np.zeros((slots, 1))])
    device = np.repeat(np.eye(devices), slots // devices, axis=1)
    time = np.hstack([device, price * device, -np.ones((devices, 1))])
    solved = milp(
        np.eye(2 * slots + 1)[-1],
        integrality=np.repeat([0, 1, 0], [slots, slots, 1]),
        bounds=Bounds(0, np.repeat([np.inf, 1, np.inf], [slots, slots, 1])),
        constraints=[
            LinearConstraint(whole, counts, counts), LinearConstraint(active, -np.inf, 0),
            LinearConstraint(time, -np.inf, 0),
        ],
    )  # fmt: skip
    assert solved.success
    return solved.fun


def decoding(seed, devices, homes, replicas_each, tokens):
    """Counts `[E]` of few tokens and a plan `[P]` with random replicas."""
    rng = np.random.default_rng(seed)
    experts = devices * homes
    share = rng.permutation(np.arange(1.0, experts + 1) ** -0.7)
    home = rng.permutation(experts).reshape(devices, homes)
    replicas = [rng.choice(np.setdiff1d(np.arange(experts), row), replicas_each, replace=False) for row in home]
    return rng.multinomial(tokens, share / share.sum()), np.concatenate([home, np.stack(replicas)], axis=1).ravel()


def test_close_to_the_mixed_integer_program_in_decoding():
    over = []
    for seed in range(40):
        price, devices = (8, 32, 128)[seed % 3], 4
        counts, phy2log = decoding(seed, devices, 4, 2, (16, 64, 256)[seed % 4 % 3])
        reached = time_of(split_by_quota(counts, phy2log, devices, expert_overhead_tokens=price), devices, price)
        over.append(reached / least_time(counts, phy2log, devices, price))
    assert min(over) >= 1 - 1e-6
    assert np.mean(over) < 1.02
    assert max(over) < 1.15


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 8]), st.integers(1, 4), st.sampled_from([1, 30, 200]))
@settings(max_examples=100, deadline=None)
def test_a_price_is_never_worse_than_ignoring_it(seed, devices, homes, price):
    counts, phy2log = decoding(seed, devices, homes, 1, 20 * devices)
    ignored = time_of(split_by_quota(counts, phy2log, devices), devices, price)
    assert time_of(split_by_quota(counts, phy2log, devices, expert_overhead_tokens=price), devices, price) <= ignored


@pytest.mark.parametrize(
    ("devices", "experts", "tokens", "price", "ratio"), [(8, 64, 32, 128, 0.93), (64, 128, 1024, 32, 0.98)]
)
def test_plans_that_count_active_experts_are_faster_where_few_tokens_run(devices, experts, tokens, price, ratio):
    spent = np.zeros(2)
    rng = np.random.default_rng(0)
    share = rng.permuted(np.tile(np.arange(1.0, experts + 1) ** -0.7, (4, 1)), axis=1)
    loads = rng.multinomial(tokens, share / share.sum(-1, keepdims=True), (24, 4))
    homes = flat_homes(loads[:8].sum(0).astype(float), devices, devices)
    for arm, counted in enumerate((0, price)):
        planner = HomePlanner(devices, devices, expert_overhead_tokens=counted)
        plan = ReplicationPlan.at_home(homes, devices, devices)
        for step in range(8, 24):
            plan = planner.plan(Oracle(loads).forecast(None, loads[:step]), plan, loads[:step])
            for counts, phy2log in zip(loads[step], plan.phy2log, strict=True):
                split = split_by_quota(counts, phy2log, devices, expert_overhead_tokens=price)
                spent[arm] += time_of(split, devices, price)
    assert spent[1] < ratio * spent[0]
