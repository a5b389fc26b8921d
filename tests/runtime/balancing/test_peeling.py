import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.balancing.leveling import Flow, copies_by_expert, level
from runtime.balancing.peeling import peel


def flow_of(total, phy2log, devices):
    """Copies, a split of the experts with a single slot, and the tokens of the others."""
    copies = copies_by_expert(phy2log, len(total), devices, devices)
    zero = np.zeros_like(phy2log)
    flow = Flow(zero.copy(), zero, np.zeros(devices, dtype=np.int64), np.ones(len(phy2log), dtype=bool))
    left = total.copy()
    for slot, expert in enumerate(phy2log):
        if expert >= 0 and (phy2log == expert).sum() == 1:
            flow.quota[slot] = total[expert]
            flow.load[slot // (len(phy2log) // devices)] += total[expert]
            left[expert] = 0
    return copies, flow, left


def tree(rng, devices):
    """One home and one replica slot on each device; each copy joins two devices that nothing joined before."""
    home = rng.permutation(devices)
    group, replica = np.arange(devices), np.full(devices, -1)
    for device in rng.permutation(devices):
        other = int(rng.integers(devices))
        if group[device] != group[other]:
            replica[device] = home[other]
            group[group == group[device]] = group[other]
    return np.stack([home, replica], axis=1).ravel()


seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.sampled_from([2, 5, 16, 64, 256]))
@settings(max_examples=60, deadline=None)
def test_on_trees_the_max_flow_has_nothing_left_to_do(seed, devices):
    rng = np.random.default_rng(seed)
    phy2log = tree(rng, devices)
    total = rng.zipf(1.3, devices).clip(max=5000).astype(np.int64)
    copies, flow, left = flow_of(total, phy2log, devices)
    reference = flow_of(total, phy2log, devices)[1]
    first = np.unique(phy2log, return_index=True)[1][-devices:]  # all tokens begin in the first slot of their expert
    np.add.at(reference.load, first // 2, left)
    reference.quota[first] += left
    target = level(reference, copies, copies, False, 0)
    peel(flow, copies, left, phy2log, target)
    assert flow.load.max() == target


@given(seeds, st.sampled_from([2, 8, 32]), st.integers(1, 4), st.integers(0, 3), st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_every_token_gets_a_slot_of_its_expert(seed, devices, homes, replicas, target):
    rng = np.random.default_rng(seed)
    experts = devices * homes
    phy2log = np.concatenate(
        [rng.permutation(experts).reshape(devices, homes), rng.integers(-1, experts, (devices, replicas))], axis=1
    ).ravel()  # an expert may be on a device twice
    total = rng.integers(0, 100, experts)
    copies, flow, left = flow_of(total, phy2log, devices)
    peel(flow, copies, left, phy2log, target)
    assert (flow.quota >= 0).all()
    held = phy2log >= 0
    assert (np.bincount(phy2log[held], weights=flow.quota[held], minlength=experts) == total).all()
    assert (flow.load == flow.quota.reshape(devices, -1).sum(1)).all()
