import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.balancing.plan import ReplicationPlan, SlotMove, check_division, contiguous_homes, flat_homes


def small_plan() -> ReplicationPlan:
    """Two devices, four experts, two redundant: expert 3 has a replica on device 0."""
    return ReplicationPlan(np.array([[0, 1, 3, 2, 3, -1]]), num_devices=2)


def test_every_map_comes_from_phy2log():
    plan = small_plan()
    assert (plan.num_experts, plan.num_redundant_experts, plan.slots_per_device) == (4, 2, 3)
    assert plan.is_home_slot.tolist() == [[True, True, False, True, True, False]]
    assert plan.homes.tolist() == [[0, 1, 3, 4]]
    assert plan.replica_count.tolist() == [[1, 1, 1, 2]]
    assert plan.device_of(3) == 1


@given(st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_log2phy_and_phy2log_are_inverses(seed, replicas):
    rng = np.random.default_rng(seed)
    phy2log = np.stack([rng.permutation(np.r_[np.arange(6), rng.integers(-1, 6, 2 * replicas)]) for _ in range(3)])
    plan = ReplicationPlan(phy2log, 2)
    assert plan.log2phy.shape == (3, 6, plan.replica_count.max())
    for layer in range(3):
        for expert in range(6):
            slots = plan.log2phy[layer, expert]
            assert slots[slots >= 0].tolist() == np.flatnonzero(phy2log[layer] == expert).tolist()
            assert (slots[plan.replica_count[layer, expert] :] == -1).all()


def test_empty_slots_are_filled_with_the_rarest_expert_that_the_device_lacks():
    bare = ReplicationPlan.at_home(contiguous_homes(1, 4), num_devices=2, num_redundant_experts=4)
    assert bare.phy2log.tolist() == [[0, 1, -1, -1, 2, 3, -1, -1]]
    assert bare.filled().phy2log.tolist() == [[0, 1, 2, 3, 2, 3, 0, 1]]
    some = ReplicationPlan(np.array([[0, 1, 2, -1, 2, 3, -1, -1]]), num_devices=2)
    assert some.filled().phy2log.tolist() == [[0, 1, 2, 3, 2, 3, 0, 1]]
    assert small_plan().filled().phy2log.tolist() == [[0, 1, 3, 2, 3, 0]]
    assert (small_plan().filled().filled().phy2log == small_plan().filled().phy2log).all()


def test_a_device_that_holds_every_expert_is_filled_all_the_same():
    plan = ReplicationPlan(np.array([[0, 1, -1]]), num_devices=1)
    assert plan.filled().phy2log.tolist() == [[0, 1, 0]]


def test_moves_read_from_home_and_emptying_a_slot_moves_nothing():
    other = ReplicationPlan(np.array([[0, 1, -1, 2, 3, 0]]), num_devices=2)
    assert small_plan().moves_to(other) == [SlotMove(layer=0, slot=5, expert=0, source=0)]
    assert other.moves_to(small_plan()) == [SlotMove(layer=0, slot=2, expert=3, source=4)]


def test_at_home_leaves_replica_slots_empty():
    plan = ReplicationPlan.at_home(contiguous_homes(2, 4), num_devices=2, num_redundant_experts=2)
    assert plan.phy2log.tolist() == [[0, 1, -1, 2, 3, -1]] * 2


def test_flat_homes_spread_the_load_and_divide_equally():
    load = np.array([[8.0, 7, 1, 1, 1, 1, 1, 0]])
    homes = flat_homes(load, 4)
    assert sorted(homes[0]) == list(range(8))
    assert load[0][homes[0]].reshape(4, 2).sum(1).max() == 8


def test_a_plan_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="read-only"):
        small_plan().phy2log[0, 0] = 2


@pytest.mark.parametrize(
    ("phy2log", "devices", "text"),
    [
        ([0, 1], 1, r"shape \(2,\), expected \[layers, slots\]"),
        ([[0, 1, 1]], 2, "3 slots do not divide over 2 devices"),
        ([[0, 0, 2, 2]], 2, "layer 0 has no slot for expert 1"),
        ([[0, -2]], 2, "holds -2"),
    ],
)
def test_nonsense_is_refused(phy2log, devices, text):
    with pytest.raises(ValueError, match=text):
        ReplicationPlan(np.array(phy2log), devices)


def test_what_does_not_divide_is_refused():
    with pytest.raises(
        ValueError, match="4 experts and 0 redundant experts do not divide over 3 devices; choose 2 red"
    ):
        ReplicationPlan.at_home(contiguous_homes(1, 4), 3, 0)
    with pytest.raises(
        ValueError, match=r"4 experts and 3 redundant .* over 2 devices; choose 2 or 4 redundant experts"
    ):
        ReplicationPlan.at_home(contiguous_homes(1, 4), 2, 3)
    with pytest.raises(ValueError, match=r"do not divide over 2 devices; choose at most 4 redundant experts$"):
        check_division(4, 2, 10**30 + 1)
    check_division(4, 2, 4)


def test_a_plan_without_fixed_homes_says_so():
    with pytest.raises(ValueError, match="no fixed homes"):
        _ = ReplicationPlan(np.array([[0, 0, 1, 2, 3, 1]]), 2).homes


def test_plans_of_different_shape_have_no_moves():
    with pytest.raises(ValueError, match="plans differ in shape"):
        small_plan().moves_to(ReplicationPlan(np.array([[0, 1]]), 2))
