"""The collectives of several ranks with a GPU each, run one after another: threads, order, first calls, contexts."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data.models.model import load_model
from data.traces.trace import TokenBatch, pad_tokens
from runtime.distributed.ranks import Ranks
from runtime.engine.batch import ModelBatch
from runtime.engine.engine import Engine
from tests.helpers.budgets import budget
from tests.helpers.fake_ranks import (
    assert_first_calls_are_joined,
    assert_one_thread,
    assert_same_order,
    on_fake_ranks,
)
from tests.helpers.forecasters import Noise

WORLD, REDUNDANT = 4, 4


def equal_shares(count: int) -> list[ModelBatch]:
    """Batches in which all ranks have the same sequences, long enough for every rank to need all experts."""
    rng = np.random.default_rng(0)

    def rows(length: int) -> TokenBatch:
        share = [rng.integers(3, 400, length) for _ in range(3)]
        return pad_tokens(share * WORLD, pad=0)

    return [ModelBatch(rows(40), rows(20)) for _ in range(count)]


@pytest.fixture(scope="module", params=[1, 2], ids=["one machine", "two machines"])
def logs(request, switch_folder):
    """Four ranks run batches, of which each waits for its preparation; plans leave ranks out of moves."""
    layout = load_model(str(switch_folder)).layout

    def run(rank: int):
        with Engine(switch_folder, Noise(layout), None, REDUNDANT, max_moves=1, dtype="bfloat16") as engine:
            return [output for batch in equal_shares(4) for output in engine.run([batch])]

    return on_fake_ranks(WORLD, run, request.param)


def test_every_rank_moves_weights_and_exchanges_rows(logs):
    for log in logs:
        assert [output.stats.preparation is not None for output in log.result] == [True] * 4
        assert {call.operation for call in log.gloo} >= {"broadcast", "all_reduce"}
        assert "all_to_all_single" in {call.operation for call in log.nccl}
    assert not any(call.transfers for log in logs for call in log.nccl)


def test_weights_are_pulled_on_a_machine_and_sent_between_machines(logs, request):
    sent = [call for log in logs for call in log.gloo if call.transfers]
    assert bool(sent) == (request.node.callspec.params["logs"] == 2)


def test_all_ranks_call_alike(logs):
    assert_same_order(logs)


def test_nccl_is_called_from_one_thread(logs):
    assert_one_thread(logs)


def test_nccl_is_called_in_one_group(logs):
    """Two groups are two communicators, whose calls could wait for each other even from one thread."""
    assert {call.group for log in logs for call in log.nccl} == {"default"}


def test_all_ranks_join_the_first_call_of_a_group(logs):
    assert_first_calls_are_joined(logs)


def test_a_rank_makes_its_own_device_current_alone(logs):
    assert [log.contexts for log in logs] == [{rank} for rank in range(WORLD)]


def test_the_communicator_is_made_with_all_ranks_when_the_groups_open():
    def run(rank: int):
        with mock.patch.object(dist, "init_process_group", wraps=dist.init_process_group) as init, Ranks():
            return init.call_args.kwargs["device_id"]

    assert [log.result for log in on_fake_ranks(2, run)] == [torch.device("cuda", rank) for rank in range(2)]


def test_threads_that_load_experts_make_the_ranks_own_device_current(switch_folder):
    def run(rank: int):
        with Engine(switch_folder, None, None, REDUNDANT, device_memory=budget(6), host_memory=budget(8)) as engine:
            return list(engine.run(equal_shares(1)))

    assert [log.contexts for log in on_fake_ranks(2, run)] == [{0}, {1}]


def test_counts_are_gathered_into_one_tensor(logs):
    gathers = {call.operation for log in logs for call in log.nccl if "all_gather" in call.operation}
    assert gathers <= {"all_gather_single", "all_gather_into_tensor"}
    assert gathers
