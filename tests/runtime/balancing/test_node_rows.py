"""Group-limited routing: no copy leaves the node of its group, whatever is planned, and nodes are balanced within."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.baselines.history import Ema, LastBatch, Oracle
from predictor.forecast import forecast_from_load
from runtime.balancing.eplb import rebalance_experts
from runtime.balancing.node_rows import NodeRows
from runtime.balancing.plan import ReplicationPlan, contiguous_homes, flat_homes
from runtime.balancing.planner import HomePlanner
from runtime.balancing.split import balancedness, split_load

RECORDED = Path(__file__).parents[1] / "recorded"

sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 2), st.integers(1, 4), st.integers(0, 2))
"""Nodes, devices of each, groups of each, experts of a group, slots of a device beyond those that homes need."""
options = st.fixed_dictionaries(
    {
        "moving_homes": st.booleans(),
        "max_moves": st.sampled_from([None, 3]),
        "expert_overhead_tokens": st.sampled_from([0, 20]),
        "move_tokens": st.sampled_from([0.0, 100.0]),
    }
)


def counted(sizes):
    """Nodes, devices of each, groups, experts and redundant experts."""
    num_nodes, each, groups_each, size, more = sizes
    groups, devices = num_nodes * groups_each, num_nodes * each
    experts = groups * size
    least = -(-experts // devices)
    return num_nodes, each, groups, experts, min(least + more, experts) * devices - experts


def node_of_each_group(plan, num_groups, num_nodes):
    """`[L, groups]`, after making sure that all copies of a group's experts are on its node."""
    layers, slots = plan.phy2log.shape
    group_E = np.arange(plan.num_experts) * num_groups // plan.num_experts
    there = np.arange(slots) * num_nodes // slots
    found = np.full((layers, num_groups), -1)
    for layer, slot in np.argwhere(plan.phy2log >= 0):
        group = group_E[plan.phy2log[layer, slot]]
        assert found[layer, group] in (-1, there[slot]), "a copy is on another node than its group"
        found[layer, group] = there[slot]
    return found


@given(st.integers(0, 2**32 - 1), sizes, options, st.sampled_from([LastBatch(), Ema(), None]))
@settings(max_examples=200)
def test_no_copy_leaves_the_node_of_its_group(seed, sizes, options, forecaster):
    num_nodes, each, groups, experts, redundant = counted(sizes)
    devices = num_nodes * each
    loads = np.random.default_rng(seed).zipf(1.4, (6, 2, experts)).clip(max=900).astype(np.int64)
    homes = flat_homes(loads[0].astype(float), devices, redundant, num_groups=groups, devices_per_node=each)
    plan = ReplicationPlan.at_home(homes, devices, redundant)
    planner = HomePlanner(devices, redundant, devices_per_node=each, num_groups=groups, **options)
    first = node_of_each_group(plan, groups, num_nodes)
    assert all((first == node).sum(-1).tolist() == [groups // num_nodes] * 2 for node in range(num_nodes))
    for step in range(1, len(loads)):
        target = planner.plan((forecaster or Oracle(loads)).forecast(None, loads[:step]), plan, loads[:step])
        assert (node_of_each_group(target, groups, num_nodes) == first).all()
        assert options["moving_homes"] or (target.homes == plan.homes).all()
        moves = plan.moves_to(target)
        assert options["max_moves"] is None or len(moves) <= options["max_moves"]
        for block in target.phy2log.reshape(2 * devices, -1):
            assert len(set(block[block >= 0])) == (block >= 0).sum()
        plan = target


@given(st.integers(0, 2**32 - 1), sizes)
def test_rows_are_the_same_plan(seed, sizes):
    num_nodes, each, groups, experts, redundant = counted(sizes)
    devices = num_nodes * each
    load = np.random.default_rng(seed).random((3, experts))
    homes = flat_homes(load, devices, redundant, num_groups=groups, devices_per_node=each)
    plan = ReplicationPlan.at_home(homes, devices, redundant)
    divided = NodeRows.of(plan, groups, each)
    again = divided.joined(divided.rows)
    assert (again.phy2log == plan.phy2log).all()
    assert (again.homes == plan.homes).all()
    rows = divided.rows
    moved = ReplicationPlan(rows.phy2log[:, ::-1], each, rows.phy2log.shape[1] - 1 - rows.homes)
    turned = divided.joined(moved)  # the constructor refuses a home slot that holds another expert
    assert (turned.homes // each // plan.slots_per_device == plan.homes // each // plan.slots_per_device).all()


def planned(load, homes=None, redundant=8, **options):
    """The plan from a known load, 2 nodes of 2 devices with 8 experts in 4 groups."""
    homes = contiguous_homes(1, 8) if homes is None else homes
    bare = ReplicationPlan.at_home(homes, 4, redundant)
    truth = forecast_from_load(np.array([load], dtype=float), made_at=0, source="truth")
    planner = HomePlanner(4, redundant, devices_per_node=2, num_groups=4, **options)
    return planner.plan(truth, bare, np.zeros((0, 1, 8), dtype=int))


@pytest.mark.parametrize("moving_homes", [False, True])
def test_a_node_whose_devices_are_all_above_the_mean_is_balanced_within(moving_homes):
    load = [500, 100, 100, 100, 10, 10, 10, 10]
    plan = planned(load, moving_homes=moving_homes)
    assert split_load(np.array([load]), plan)[0, :2].tolist() == [400, 400]


def test_a_node_that_is_below_the_other_ones_mean_moves_nothing():
    load = [500, 100, 100, 100, 150, 10, 10, 10]  # of the second node, one device has 160 tokens and the other 20
    plan = planned(load)
    assert (plan.phy2log[0, :8] >= 0).sum() > 4
    assert plan.phy2log[0, 8:].tolist() == [4, 5, -1, -1, 6, 7, -1, -1]


@pytest.mark.parametrize("name", ["gptoss20b", "dsv2lite"])
def test_recorded_loads_are_balanced_better_than_by_eplbs_hierarchical_policy(name):
    loads = np.load(RECORDED / f"{name}.npz")["counts"].astype(np.int64)
    homes = flat_homes(loads[0].astype(float), 16, 16, num_groups=8, devices_per_node=8)
    plan = ReplicationPlan.at_home(homes, 16, 16)
    planner, ours, theirs, moves = HomePlanner(16, 16, devices_per_node=8, num_groups=8), [], [], 0
    for step in range(1, len(loads)):
        target = planner.plan(LastBatch().forecast(None, loads[:step]), plan, loads[:step])
        moves, plan = moves + len(plan.moves_to(target)), target
        ours.append(balancedness(split_load(loads[step], plan)).mean())
        phy2log, _, count = rebalance_experts(loads[step - 1], loads.shape[2] + 16, 8, 2, 16)
        each = np.take_along_axis(loads[step] / count, phy2log, axis=-1).reshape(len(count), 16, -1).sum(-1)
        theirs.append((each.mean(-1) / each.max(-1)).mean())
    assert np.mean(ours) > np.mean(theirs) + 0.03
    assert moves / len(ours) / loads.shape[1] < 4


def test_groups_go_to_nodes_by_their_load_and_experts_to_devices_within():
    load = np.array([[1.0, 8, 1, 0, 2, 3, 3, 2]])  # groups 9, 1, 5, 5
    grouped = {"num_groups": 4, "devices_per_node": 2}
    assert flat_homes(load, 4, **grouped).tolist() == [[1, 3, 0, 2, 4, 5, 6, 7]]
    twice = np.concatenate([2 * load, load], axis=1)  # groups of 4 experts with loads 20, 20, 10, 10
    homes = flat_homes(twice, 6, 2, num_groups=4, devices_per_node=3)
    first, second = (sorted(node[node >= 0].tolist()) for node in homes.reshape(2, 9))
    assert first == [*range(4), *range(8, 12)]
    assert second == [*range(4, 8), *range(12, 16)]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ([0, 2, 4, 6, 1, 3, 5, 7], "layer 0: expert 1 of group 0 is on node 1, other experts of its group on node 0"),
        ([0, 1, 2, 4, 3, 5, 6, 7], "layer 0: expert 3 of group 1 is on node 1, other experts of its group on node 0"),
    ],
)
def test_homes_that_part_a_group_are_refused(row, text):
    with pytest.raises(ValueError, match=text):
        planned(np.arange(8), homes=np.array([row]))


def test_copies_on_another_node_and_nodes_with_more_groups_are_refused():
    bare = ReplicationPlan.at_home(contiguous_homes(1, 8), 4, 4)
    phy2log = bare.phy2log.copy()
    phy2log[0, -1] = 0
    with pytest.raises(ValueError, match="expert 0 of group 0 is on node 1, other experts of its group on node 0"):
        NodeRows.of(bare.with_slots(phy2log), 4, 2)
    uneven = ReplicationPlan.at_home(np.array([[0, 1, 2, 3, 4, 5, -1, 6, 7, -1, -1, -1]]), 4, 4)
    with pytest.raises(ValueError, match="layer 0: node 0 holds 3 groups of experts, expected 2 on each"):
        NodeRows.of(uneven, 4, 2)


@pytest.mark.parametrize(
    ("num_groups", "devices_per_node", "text"),
    [
        (3, 2, "3 groups of experts cannot be shared equally by 2 nodes of 2 devices; choose a multiple of the nodes"),
        (0, 2, "0 groups of experts cannot be shared equally by 2 nodes"),
        (4, None, "4 groups of experts stay on their nodes, and devices_per_node is not given; give both"),
        (6, 2, "8 experts do not divide into 6 groups; choose a divisor"),
        (4, 3, "devices_per_node is 3, which does not divide 4 devices"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(num_groups, devices_per_node, text):
    with pytest.raises(ValueError, match=text):
        flat_homes(np.ones((1, 8)), 4, num_groups=num_groups, devices_per_node=devices_per_node)
    load, bare = np.ones((1, 8), dtype=np.int64), ReplicationPlan.at_home(contiguous_homes(1, 8), 4, 4)
    grouped = {"num_groups": num_groups, "devices_per_node": devices_per_node}
    with pytest.raises(ValueError, match=text):
        HomePlanner(4, 4, **grouped).plan(LastBatch().forecast(None, load[None]), bare, load[None])
