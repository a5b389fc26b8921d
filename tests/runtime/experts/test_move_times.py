"""The price of a move between nodes is measured by moves that nobody sees, and is the same on all ranks."""

import copy

import pytest
import torch

from data.models.layout import MoELayout
from data.models.model import LoadedModel
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.balancing.planner import BETWEEN_NODES
from runtime.distributed.ranks import Ranks
from runtime.engine.engine import Engine
from runtime.experts.move_times import REPEATS, example_moves, measure_between_nodes
from runtime.experts.transfer import WeightTransfer
from tests.conftest import small_switch
from tests.helpers.batches import batches, largest_difference
from tests.helpers.forecasters import Noise
from tests.helpers.processes import on_ranks


def plan_of(devices: int, redundant: int, experts: int = 8) -> ReplicationPlan:
    return ReplicationPlan.at_home(contiguous_homes(1, experts), devices, redundant)


def test_one_slot_receives_from_its_own_node_and_from_another_one():
    near, far = example_moves(plan_of(4, 4), devices_per_node=2)
    assert near.slot == far.slot == 2
    assert (near.source // 3, far.source // 3) == (1, 2)
    near, far = example_moves(plan_of(6, 4), devices_per_node=3)  # 8 homes in 12 slots: devices have 1 or 2
    homes = plan_of(6, 4).homes[0]
    assert [homes[move.expert] == move.source for move in (near, far)] == [True, True]
    assert near.source // 2 // 3 == near.slot // 2 // 3 != far.source // 2 // 3
    assert near.source // 2 != near.slot // 2


@pytest.mark.parametrize(("devices", "redundant", "node"), [(4, 0, 2), (4, 4, 4), (4, 4, 1)])
def test_nothing_is_compared_without_replica_slots_or_two_kinds_of_sources(devices, redundant, node):
    assert example_moves(plan_of(devices, redundant), node) is None


def engine_on_nodes(rank: int, machines: int) -> dict[str, object]:
    """An engine's measured price on 4 ranks in two nodes, and what its outputs and slots are afterwards."""
    Ranks.host = property(lambda ranks: f"machine {ranks.rank * machines // ranks.world}")
    model = small_switch(seed=0)
    switch, plain = LoadedModel(model, None, MoELayout.from_model(model, "random")), copy.deepcopy(model)
    with Engine(switch, Noise(switch.layout), None, 8, devices_per_node=2, num_groups=4) as engine:
        plan = engine.replicated.transfer.plan
        found: dict[str, object] = {
            "price": engine.replicated.between_nodes,
            "planned with": engine.controller.planner.between_nodes,
            "bare": bool((plan.phy2log == engine.home.phy2log).all()),
            "pulls": sorted(engine.replicated.transfer._mapped.pulls[rank]),
        }
        found["difference"] = largest_difference(engine, plain, batches(6))
    with Engine(switch, Noise(switch.layout), None, 8) as engine:
        found["one node"] = engine.replicated.between_nodes, engine.controller.planner.between_nodes
    return found


@pytest.mark.parametrize("machines", [1, 2])
def test_an_engine_measures_its_links_and_all_ranks_have_the_same_price(machines):
    results = on_ranks(4, engine_on_nodes, machines)
    assert isinstance(results[0], dict), results[0]
    assert 1 <= results[0]["price"] < float("inf")
    for rank, found in enumerate(results):
        assert found["price"] == found["planned with"] == results[0]["price"]
        assert found["bare"]
        assert found["difference"] <= 1e-5
        assert found["one node"] == (None, BETWEEN_NODES)
        pulled = range(4) if machines == 1 else range(rank // 2 * 2, rank // 2 * 2 + 2)
        assert found["pulls"] == [other for other in pulled if other != rank]


class Timed(WeightTransfer):
    """Moves as usual, and takes what it is told for the time: 2 ms within a node of two, else 16, the first 1 s."""

    calls = 0

    def seconds(self, moves):
        super().seconds(moves)
        self.calls, move = self.calls + 1, moves[0]
        if self.calls % (1 + REPEATS) == 1:
            return 1.0
        return 0.002 if self.owner(move.slot) // 2 == self.owner(move.source) // 2 else self.far_s


def timed(rank: int, far_s: float) -> tuple[float | None, int]:
    model = small_switch(seed=0)
    switch = LoadedModel(model, None, MoELayout.from_model(model, "random"))
    with Engine(switch, None, None, 8) as engine:
        transfer = engine.replicated.transfer
        told = Timed(transfer.layers, transfer.plan, engine.ranks)
        told.far_s = far_s if rank == 0 else float("nan")  # rank 0 receives; the other ranks' times do not count
        with torch.inference_mode():
            return measure_between_nodes(told, 2), told.calls


@pytest.mark.parametrize(("far_s", "price"), [(0.016, 8.0), (0.001, 1.0)])
def test_the_price_is_the_ratio_of_the_receivers_medians_and_at_least_one(far_s, price):
    assert on_ranks(4, timed, far_s) == [(pytest.approx(price), 2 * (1 + REPEATS))] * 4
