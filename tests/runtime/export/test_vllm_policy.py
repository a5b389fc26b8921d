"""The policy has the arguments and results of vLLM's; `make peers` runs it with vLLM's own code."""

import sys
from abc import ABC, abstractmethod
from types import ModuleType

import numpy as np
import pytest
import torch

from runtime.balancing.eplb import rebalance_experts
from runtime.export.vllm_policy import FewMovesPolicy, register

WEIGHT = torch.tensor(np.random.default_rng(0).zipf(1.5, (3, 16)).clip(max=500), dtype=torch.float32)


def test_results_are_whole_numbers_on_the_cpu_in_every_slot():
    placed = FewMovesPolicy.rebalance_experts(WEIGHT, 24, 1, 1, 4)
    assert (placed.dtype, placed.device.type, placed.shape) == (torch.int64, "cpu", (3, 24))
    for row in placed:
        assert set(row.tolist()) == set(range(16))


def test_fewer_experts_move_than_eplb_moves():
    first = torch.arange(24).repeat(3, 1) % 16  # as vLLM begins
    ours = FewMovesPolicy.rebalance_experts(WEIGHT, 24, 1, 1, 4, first)
    theirs, _, _ = rebalance_experts(WEIGHT, 24, 1, 1, 4)
    assert (ours != first).sum() < (theirs != first).sum()
    again = FewMovesPolicy.rebalance_experts(WEIGHT * 2, 24, 1, 1, 4, ours)
    assert (again == ours).all()


@pytest.mark.parametrize("old", [torch.arange(32).repeat(3, 1) % 16, torch.full((3, 24), -1)])
def test_other_numbers_of_slots_and_empty_ones_are_placed_anew(old):
    placed = FewMovesPolicy.rebalance_experts(WEIGHT, 24, 1, 1, 4, old)
    assert (placed == FewMovesPolicy.rebalance_experts(WEIGHT, 24, 1, 1, 4)).all()


def test_registering_makes_a_subclass_of_vllms_own(monkeypatch):
    class AbstractEplbPolicy(ABC):
        @classmethod
        @abstractmethod
        def rebalance_experts(cls, *arguments):
            raise NotImplementedError

    policy = ModuleType("vllm.distributed.eplb.policy")
    policy.AbstractEplbPolicy, policy.EPLB_POLICIES = AbstractEplbPolicy, {"default": None}
    for name in ("vllm", "vllm.distributed", "vllm.distributed.eplb"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, policy.__name__, policy)
    made = register()
    assert {"default": made} == policy.EPLB_POLICIES
    assert issubclass(made, AbstractEplbPolicy)
    assert made().rebalance_experts(WEIGHT, 24, 1, 1, 4).shape == (3, 24)
