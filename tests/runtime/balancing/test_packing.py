import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.balancing.packing import pack, pack_with_replicas
from runtime.balancing.plan import ReplicationPlan, contiguous_homes, flat_homes


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 4))
def test_packing_is_longest_processing_time_first(seed, devices, slots):
    load = np.random.default_rng(seed).random(devices * slots)
    found, sums, used = pack(load, devices, slots), np.zeros(devices), np.zeros(devices, dtype=int)
    for item in np.argsort(-load, kind="stable"):
        open_devices = np.flatnonzero(used < slots)
        device = open_devices[np.argmin(sums[open_devices])]
        assert found[item] == device
        sums[device] += load[item]
        used[device] += 1


def test_replica_slots_lie_where_a_hot_experts_copies_fit():
    phy2log = pack_with_replicas(np.array([[9.0, 1, 2, 2]]), 3, 2).reshape(3, 2)
    assert sorted(phy2log[phy2log >= 0]) == [0, 1, 2, 3]
    assert (phy2log == -1).sum(1).max() == 1


def test_without_known_loads_homes_are_spread_evenly():
    plan = ReplicationPlan.at_home(contiguous_homes(2, 256), 320, 64)
    homes = plan.is_home_slot.reshape(2, 320, -1).sum(-1)
    assert homes.max() == 1
    assert homes.sum() == 512
    assert ReplicationPlan.at_home(contiguous_homes(1, 4), 3, 2).phy2log.tolist() == [[0, -1, 1, -1, 2, 3]]


def test_the_equal_case_has_equal_blocks():
    load = np.array([[8.0, 7, 1, 1, 1, 1, 1, 0]])
    assert flat_homes(load, 4, 4).shape == (1, 8)
    assert ReplicationPlan.at_home(flat_homes(load, 4, 4), 4, 4).home_slots is None
