"""Collectives of fake ranks: what each one calls is recorded, and planted faults are found."""

import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist

from runtime.distributed.ranks import Ranks
from tests.helpers.fake_ranks import (
    assert_first_calls_are_joined,
    assert_one_thread,
    assert_same_order,
    on_fake_ranks,
)

WORLD = 3


def exchange(ranks: Ranks) -> None:
    """One exchange of rows, as a layer makes it: of equal sizes."""
    rows = torch.ones(WORLD, 2, device=ranks.device)
    ranks.all_to_all(rows, [1] * WORLD, torch.empty_like(rows), [1] * WORLD).wait()


def send_round(ranks: Ranks, members: int, group=None) -> None:
    """Each of the first ranks sends a row to the next one."""
    if ranks.rank < members:
        row, other = torch.ones(2, device=ranks.device), torch.empty(2, device=ranks.device)
        following, preceding = (ranks.rank + 1) % members, (ranks.rank - 1) % members
        calls = [dist.P2POp(dist.isend, row, following, group), dist.P2POp(dist.irecv, other, preceding, group)]
        for work in dist.batch_isend_irecv(calls):
            work.wait()


def on_ranks(function):
    def one(rank: int):
        with Ranks() as ranks:
            return function(ranks)

    return on_fake_ranks(WORLD, one)


def test_calls_are_recorded_with_thread_group_and_sizes():
    def work(ranks):
        told = ranks.broadcast(np.array([ranks.rank + 5, 1]))
        exchange(ranks)
        send_round(ranks, WORLD)
        return ranks.device, told.tolist()

    logs = on_ranks(work)
    assert [log.result for log in logs] == [(torch.device("cuda", rank), [5, 1]) for rank in range(WORLD)]
    for log in logs:
        assert log.contexts == {log.rank}
        (tell,), (swap, batch) = log.gloo, log.nccl
        assert (tell.operation, tell.sizes, tell.members) == ("broadcast", ((2,),), (0, 1, 2))
        assert (swap.operation, swap.group, swap.sizes) == ("all_to_all_single", "default", ((3, 2), (3, 2)))
        assert {tell.thread, swap.thread, batch.thread} == {"MainThread"}
        assert (tell.before, swap.before, batch.before) == (0, 1, 2)
        assert batch.transfers == (("isend", (log.rank + 1) % 3), ("irecv", (log.rank - 1) % 3))
        assert tell.group != swap.group
    for check in (assert_one_thread, assert_same_order, assert_first_calls_are_joined):
        check(logs)


def test_a_second_thread_is_found():
    def work(ranks):
        exchange(ranks)
        thread = threading.Thread(target=exchange, args=(ranks,), name="mover")
        thread.start()
        thread.join()

    logs = on_ranks(work)
    with pytest.raises(
        AssertionError, match=r"^rank 0 makes NCCL calls from 2 threads: MainThread \(all_to_all_single"
    ):
        assert_one_thread(logs)
    assert_same_order(logs)


def test_another_order_is_found():
    def work(ranks):
        calls = [lambda: exchange(ranks), lambda: ranks.gather(torch.ones(2, device=ranks.device))]
        for call in calls if ranks.rank < 2 else reversed(calls):
            call()

    with pytest.raises(AssertionError, match=r"^NCCL collective 0 is .* 'all_to_all_single'\) on rank 0 and .* rank 2"):
        assert_same_order(on_ranks(work))


def test_a_rank_that_leaves_a_call_out_is_found():
    def work(ranks):
        for _ in range(1 if ranks.rank == 1 else 2):
            exchange(ranks)

    with pytest.raises(AssertionError, match=r"^2 NCCL collectives on rank 0, 1 on rank 1$"):
        assert_same_order(on_ranks(work))


def test_a_transfer_without_its_other_end_is_found():
    with pytest.raises(AssertionError, match=r"rank 1 sends \[\(0, \(2,\)\)\] to rank 2, which expects \[\]"):
        assert_same_order(on_ranks(lambda ranks: send_round(ranks, 3) if ranks.rank < 2 else None))


@pytest.mark.parametrize("warm", [True, False])
def test_a_first_call_that_not_all_ranks_join_is_found(warm):
    def work(ranks):
        if warm:
            exchange(ranks)
        send_round(ranks, 2)
        ranks.broadcast(np.array([1]))
        send_round(ranks, WORLD)

    logs = on_ranks(work)
    if warm:
        assert_first_calls_are_joined(logs)
        return
    message = r"^ranks \[2\] do not join batch_isend_irecv, the first NCCL call of group default$"
    with pytest.raises(AssertionError, match=message):
        assert_first_calls_are_joined(logs)
