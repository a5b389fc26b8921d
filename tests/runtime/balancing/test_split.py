import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import coo_array

from runtime.balancing.split import device_load, split_by_quota, split_evenly


def random_layer(rng, devices, homes, replicas_each):
    """Skewed counts `[E]` and a plan `[P]` with replicas of mostly hot experts, none twice on a device."""
    experts = devices * homes
    counts = rng.zipf(1.4, experts).clip(max=2000) * rng.integers(0, 9, experts)
    home = rng.permutation(experts).reshape(devices, homes)
    hot = np.argsort(-counts)[: max(2 * devices, replicas_each + homes)]
    replicas = [rng.choice(np.setdiff1d(hot, home[g]), replicas_each, replace=False) for g in range(devices)]
    return counts.astype(np.int64), np.concatenate([home, np.stack(replicas)], axis=1).ravel()


def from_sources(rng, counts, devices):
    """Counts `[E]` dealt at random to source devices, `[G, E]`."""
    return rng.multinomial(counts, np.full(devices, 1 / devices)).T


def least_maximum(counts, phy2log, devices, device=None):
    """The smallest possible load of the most loaded device, tokens divisible: the linear program."""
    slots = len(phy2log)
    if device is None:
        device = np.arange(slots) // (slots // devices)
    rows = np.concatenate([device, np.arange(devices)])
    columns = np.concatenate([np.arange(slots), np.full(devices, slots)])
    loads = coo_array((np.concatenate([np.ones(slots), -np.ones(devices)]), (rows, columns)))
    whole = coo_array((np.ones(slots), (phy2log, np.arange(slots))), shape=(len(counts), slots + 1))
    cost = np.eye(slots + 1)[-1]
    solved = linprog(cost, A_ub=loads, b_ub=np.zeros(devices), A_eq=whole, b_eq=counts, method="highs")
    assert solved.success
    return solved.fun


layers = st.builds(
    lambda seed, devices, homes, replicas_each: (np.random.default_rng(seed), devices, homes, replicas_each),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(2, 6),
    st.integers(0, 2),
).filter(lambda case: case[1] > 1 or case[3] == 0)


@given(layers, st.sampled_from([0, 5]), st.booleans())
@settings(max_examples=150)
def test_quotas_sum_to_the_counts_and_are_the_same_on_every_rank(case, overhead, by_source):
    rng, devices, homes, replicas_each = case
    counts, phy2log = random_layer(rng, devices, homes, replicas_each)
    given_counts = from_sources(rng, counts, devices) if by_source else counts[None]
    quotas = split_by_quota(given_counts, phy2log, devices, expert_overhead_tokens=overhead)
    assert (quotas >= 0).all()
    back = np.stack([np.bincount(phy2log, weights=row, minlength=len(counts)) for row in quotas])
    assert (back == given_counts).all()
    again = split_by_quota(given_counts.copy(), phy2log.copy(), devices, expert_overhead_tokens=overhead)
    assert (quotas == again).all()


@given(layers)
@settings(max_examples=150)
def test_no_device_is_above_the_even_split_and_renaming_devices_changes_nothing(case):
    rng, devices, homes, replicas_each = case
    counts, phy2log = random_layer(rng, devices, homes, replicas_each)
    most = device_load(split_by_quota(counts, phy2log, devices), devices).max()
    assert most <= device_load(split_evenly(counts, phy2log, devices), devices).max()
    renamed = rng.permutation(phy2log.reshape(devices, -1)).ravel()
    assert device_load(split_by_quota(counts, renamed, devices), devices).max() == most


def test_as_good_as_the_linear_program_on_a_thousand_cases():
    rng = np.random.default_rng(0)
    for case in range(1000):
        devices = 64 if case % 50 == 0 else 32 if case % 25 == 1 else 16 if case % 5 == 2 else 8
        counts, phy2log = random_layer(rng, devices, int(rng.integers(2, 8 if devices < 32 else 4)), 1 + case % 2)
        given_counts = from_sources(rng, counts, devices) if case % 3 == 0 else counts
        most = device_load(split_by_quota(given_counts, phy2log, devices), devices).max()
        assert most == np.ceil(least_maximum(counts, phy2log, devices) - 1e-6)


@pytest.mark.parametrize(("devices", "homes", "empty"), [(256, 1, 0.0), (256, 1, 0.3), (128, 2, 0.0), (96, 4, 0.1)])
def test_as_good_as_the_linear_program_at_production_size(devices, homes, empty):
    rng = np.random.default_rng(devices)
    for case in range(4):
        counts, phy2log = random_layer(rng, devices, homes, 1 + case % 2)
        replicas = phy2log.reshape(devices, -1)[:, homes:]
        replicas[rng.random(replicas.shape) < empty] = -1
        held = phy2log >= 0
        slots, device = phy2log[held], np.repeat(np.arange(devices), phy2log.size // devices)[held]
        given_counts = from_sources(rng, counts, devices) if case % 2 else counts
        most = device_load(split_by_quota(given_counts, phy2log, devices), devices).max()
        assert most == np.ceil(least_maximum(counts, slots, devices, device) - 1e-6)


def test_the_example_worked_by_hand():
    # expert 0 (10 tokens) lives on device 0 with a copy on 1, expert 1 (4) on device 0, expert 2 (2) on 1, 3 (0) on 1
    quotas = split_by_quota([10, 4, 2, 0], np.array([0, 1, -1, 2, 3, 0]), 2)
    assert quotas.tolist() == [[4, 4, 0, 2, 0, 6]]


def test_tokens_stay_on_their_own_device_where_that_costs_nothing():
    counts = np.array([[6, 2], [6, 2]])
    quotas = split_by_quota(counts, np.array([0, 1, 1, 0]), 2)
    assert quotas.tolist() == [[6, 2, 0, 0], [0, 0, 2, 6]]


def test_then_on_their_own_node():
    counts = np.zeros((4, 4), dtype=int)
    counts[1, 0] = counts[3, 0] = 10  # copies of expert 0 on devices 0 and 2, its tokens on devices 1 and 3
    phy2log = np.array([0, -1, 1, -1, 2, 0, 3, -1])
    quotas = split_by_quota(counts, phy2log, 4, devices_per_node=2)
    assert quotas[1, 0] == 10
    assert quotas[3, 5] == 10


def test_a_copy_is_not_made_active_for_a_handful_of_tokens():
    phy2log = np.array([0, 1, -1, 2, 3, 0])
    counts = [100, 0, 94, 0]
    assert split_by_quota(counts, phy2log, 2)[0, 5] == 3
    assert split_by_quota(counts, phy2log, 2, expert_overhead_tokens=10)[0, 5] == 0
    assert split_by_quota([100, 0, 20, 0], phy2log, 2, expert_overhead_tokens=10)[0, 5] > 30


def test_no_tokens_at_all():
    assert not split_by_quota(np.zeros((2, 4), dtype=int), np.array([0, 1, 3, 2, 3, 0]), 2).any()


def test_even_split_turns_odd_tokens_with_the_source():
    quotas = split_evenly([[3, 0], [3, 0]], np.array([0, -1, 1, 0]), 2)
    assert quotas.tolist() == [[2, 0, 0, 1], [1, 0, 0, 2]]


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ([1.5, 2.0, 0.0, 0.0], "dtype float64, expected whole numbers"),
        ([1, -2, 0, 0], "counts hold -2"),
        ([1, 2], "counts are for 2 experts, the plan holds 4"),
        ([[1, 2, 3, 4]] * 3, r"shape \(3, 4\)"),
    ],
)
def test_nonsense_is_refused(counts, text):
    with pytest.raises(ValueError, match=text):
        split_by_quota(counts, np.array([0, 1, -1, 2, 3, 0]), 2)


def test_costs_and_nodes_are_checked():
    with pytest.raises(ValueError, match="expert_overhead_tokens is -1"):
        split_by_quota([1, 1], np.array([0, 1]), 2, expert_overhead_tokens=-1)
    with pytest.raises(ValueError, match="devices_per_node is 3, which does not divide 2 devices"):
        split_by_quota([1, 1], np.array([0, 1]), 2, devices_per_node=3)


def test_an_expert_without_a_slot_is_refused():
    with pytest.raises(ValueError, match="expert 2 has no slot"):
        split_by_quota([1, 2, 3, 4], np.array([0, 1, 1, 3, 3, 0]), 2)
