"""Weights are written to standby copies, and nothing that computes changes before the commit."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data.models.expert import ExpertFormat
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.distributed.ranks import Ranks
from runtime.distributed.shared_block import MEMORY, SharedBlock
from runtime.experts.grouped_mm import ExpertFunction
from runtime.experts.slots import ResidentSlots
from runtime.experts.transfer import WeightTransfer
from tests.helpers.processes import on_ranks

DEVICES, REDUNDANT, EXPERTS, LAYERS = 2, 4, 4, 2  # slots of a device: 2 homes, 2 replicas
FUNCTION = ExpertFunction(ExpertFormat.plain(8, 4), torch.nn.ReLU())


class Numbered:
    """Weights that are all the number of their layer and expert."""

    def fill(self, layer, expert, buffers):
        for buffer in buffers:
            buffer.fill_(10 * layer + expert + 1)

    def release(self):
        pass


def transfer_of(devices: range, ranks: Ranks, shared: bool = False) -> WeightTransfer:
    home = ReplicationPlan.at_home(contiguous_homes(LAYERS, EXPERTS), DEVICES, REDUNDANT)
    layers = [ResidentSlots(home, layer, devices, FUNCTION, torch.empty(1), shared) for layer in range(LAYERS)]
    for slots in layers:
        slots.fill(Numbered())
    return WeightTransfer(layers, home, ranks)


def with_replicas(plan: ReplicationPlan, *replicas: tuple[int, int, int]) -> ReplicationPlan:
    """A plan with other experts in some slots: (layer, slot, expert)."""
    phy2log = plan.phy2log.copy()
    for layer, slot, expert in replicas:
        phy2log[layer, slot] = expert
    return ReplicationPlan(phy2log, plan.num_devices)


def active_numbers(transfer: WeightTransfer) -> list[list[int]]:
    """The number of the expert that each slot here computes with, by layer; 0 in slots that were never written."""
    numbers = []
    for slots in transfer.layers:
        numbers.append([])
        for slot in range(slots.span.start, slots.span.stop):
            wi_FD, wo_DF = slots.active(slot)
            assert wi_FD.unique().tolist() == wo_DF.unique().tolist()
            numbers[-1].append(int(wi_FD.flatten()[0]))
    return numbers


FIRST = ((0, 2, 3), (1, 6, 0))  # layer 0: expert 3 in device 0's first replica slot; layer 1: expert 0 in device 1's
SECOND = ((0, 2, 2), (0, 7, 1))
BEFORE = [[1, 2, 0, 0, 3, 4, 0, 0], [11, 12, 0, 0, 13, 14, 0, 0]]
AFTER_FIRST = [[1, 2, 4, 0, 3, 4, 0, 0], [11, 12, 0, 0, 13, 14, 11, 0]]
AFTER_SECOND = [[1, 2, 3, 0, 3, 4, 0, 2], [11, 12, 0, 0, 13, 14, 11, 0]]


def steps(transfer: WeightTransfer) -> list[list[list[int]]]:
    """What slots compute with: at first, and after each start and commit of two plans."""
    seen = [active_numbers(transfer)]
    for replicas in (FIRST, SECOND):
        target = with_replicas(transfer.plan, *replicas)
        moves = transfer.start(target)
        assert len(moves) == len(replicas)
        assert transfer.nbytes(moves) == len(replicas) * 2 * 8 * 4 * 4  # two float32 matrices of 8 x 4
        seen.append(active_numbers(transfer))
        assert transfer.arrived
        assert transfer.commit() is transfer.plan is target
        seen.append(active_numbers(transfer))
    return seen


def test_replicas_become_active_at_the_commit_and_equal_their_home():
    assert steps(transfer_of(range(2), Ranks())) == [BEFORE, BEFORE, AFTER_FIRST, AFTER_FIRST, AFTER_SECOND]


def on_one_rank(rank: int, shared: bool, machines: int) -> tuple[list[list[list[int]]], list[set[int]], list[str]]:
    """What its slots compute with, whose homes each rank pulls, and the shared files that are left."""
    Ranks.host = property(lambda ranks: f"machine {ranks.rank % machines}")
    with Ranks() as ranks:
        transfer = transfer_of(range(rank, rank + 1), ranks, shared)
        seen = steps(transfer)
        handles = [block.handle for slots in transfer.layers for block in slots.blocks if block.handle]
        left = [handle["name"] for handle in handles if Path(handle["name"]).exists()]
        again = WeightTransfer(transfer.layers, transfer.plan, ranks)  # a second one over the same slots
        assert again._mapped.pulls == transfer._mapped.pulls
        return seen, transfer._mapped.pulls, left


@pytest.mark.parametrize(
    ("shared", "machines", "pulls"),
    [(False, 1, [set(), set()]), (True, 1, [{1}, {0}]), (True, 2, [set(), set()])],
    ids=["sent", "pulled on one machine", "sent between machines"],
)
def test_weights_travel_between_ranks(shared, machines, pulls):
    expected = [BEFORE, BEFORE, AFTER_FIRST, AFTER_FIRST, AFTER_SECOND]
    for rank, result in enumerate(on_ranks(2, on_one_rank, shared, machines)):
        seen, pulled, left = result
        assert seen == [[row[4 * rank : 4 * rank + 4] for row in step] for step in expected]
        assert pulled == pulls
        assert left == []


def test_without_room_to_share_weights_lie_in_ordinary_memory(monkeypatch):
    def full(number, start, size):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = set(MEMORY.glob("switchcast-*"))
    block = SharedBlock.zeros((3, 2), torch.empty(1))
    assert block.handle is None
    assert block.tensor.tolist() == [[0, 0]] * 3
    assert set(MEMORY.glob("switchcast-*")) == before


def test_a_home_slot_is_never_written():
    slots = transfer_of(range(2), Ranks()).layers[0]
    with pytest.raises(AssertionError, match="slot 4 is a home slot and has no standby copy"):
        slots.standby(4)


def test_an_emptied_slot_copies_nothing():
    transfer = transfer_of(range(2), Ranks())
    transfer.start(with_replicas(transfer.plan, (0, 2, 3)))
    transfer.commit()
    assert transfer.start(with_replicas(transfer.plan, (0, 2, -1))) == []
    np.testing.assert_array_equal(transfer.commit().phy2log[0], [0, 1, -1, -1, 2, 3, -1, -1])
