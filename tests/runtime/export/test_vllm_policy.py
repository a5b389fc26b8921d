"""The policy has the arguments and results of vLLM's; `make peers` runs it with vLLM's own code."""

import sys
from abc import ABC, abstractmethod
from types import ModuleType

import numpy as np
import pytest
import torch

from runtime.balancing.eplb import rebalance_experts
from runtime.export.stdin import read_stream
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


@pytest.fixture
def policies(monkeypatch):
    """What stands in for vLLM's module of policies."""

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
    return policy


def test_registering_makes_a_subclass_of_vllms_own(policies):
    made = register()
    assert {"default": made} == policies.EPLB_POLICIES
    assert issubclass(made, policies.AbstractEplbPolicy)
    assert made().rebalance_experts(WEIGHT, 24, 1, 1, 4).shape == (3, 24)


def test_loads_that_rank_0_records_are_loads_for_export(policies, monkeypatch, tmp_path, caplog):
    recording = register(record=tmp_path / "loads.jsonl")
    for weight in (WEIGHT, torch.zeros(3, 16), WEIGHT * 2):  # vLLM places once before there are tokens
        recording.rebalance_experts(weight, 24, 1, 1, 4)
    with (tmp_path / "loads.jsonl").open("rb") as file:
        assert (read_stream(file).loads == np.stack([WEIGHT, WEIGHT * 2])).all()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    register(record=tmp_path / "other.jsonl").rebalance_experts(WEIGHT, 24, 1, 1, 4)
    assert not (tmp_path / "other.jsonl").exists()
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    assert register(record=tmp_path).rebalance_experts(WEIGHT, 24, 1, 1, 4).shape == (3, 24)
    assert "loads are not recorded" in caplog.text
    register().rebalance_experts(WEIGHT, 24, 1, 1, 4)
    assert len((tmp_path / "loads.jsonl").read_text().splitlines()) == 2
