"""The worked example of the module, and: under any quotas each token is computed exactly once."""

import threading
from itertools import chain

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.balancing.split import split_by_quota
from runtime.experts.dispatch import (
    TokenDispatch,
    first_token_of_slots,
    plan_dispatch,
)
from runtime.experts.routing import sort_on_host


def one_hot(experts, size: int) -> torch.Tensor:
    """All-zero rows for experts beyond the last one, as for dropped tokens."""
    return torch.nn.functional.one_hot(torch.as_tensor(experts, dtype=torch.int64), size + 1)[:, :size]


class FakeRanks:
    """Ranks that are threads of this process: each all-to-all swaps rows over a table."""

    def __init__(self, world: int) -> None:
        self.barrier, self.table = threading.Barrier(world, timeout=10), {}

    def of(self, rank: int) -> "FakeRank":
        return FakeRank(self, rank)


class FakeRank:
    def __init__(self, ranks: FakeRanks, rank: int) -> None:
        self.ranks, self.rank, self.out = ranks, rank, None

    def all_to_all(self, rows, send_sizes, out, receive_sizes):
        assert send_sizes[self.rank] == receive_sizes[self.rank] == 0
        self.ranks.table[self.rank] = rows.split(send_sizes)
        self.out = out
        return self

    def wait(self) -> None:
        self.ranks.barrier.wait()
        arrived = torch.cat([self.ranks.table[other][self.rank] for other in range(self.ranks.barrier.parties)])
        self.out.copy_(arrived)
        self.ranks.barrier.wait()


def round_trip(experts, quota_SP, phy2log_P, halves=False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each rank's received rows and combined output, where slot p's expert e maps a token x to 100 x + e."""
    world, num_experts = len(experts), int(phy2log_P.max()) + 1
    ranks, per_rank, results = FakeRanks(world), len(phy2log_P) // world, [None] * world
    middle = per_rank // 2 if halves else per_rank
    windows = np.array([[0, middle], [middle, per_rank]][: 1 + halves])
    buffers = np.arange(per_rank)[::-1].copy(), (1, per_rank)

    def run(rank: int) -> None:
        hidden = torch.tensor([[1000.0 * rank + token] for token in range(len(experts[rank]))])
        slots = slice(rank * per_rank, (rank + 1) * per_rank)
        tokens, _ = sort_on_host(one_hot(experts[rank], num_experts)[:, None], None, num_experts)
        load = np.zeros(world, dtype=np.int64)
        index, parts = plan_dispatch(quota_SP, phy2log_P, rank, windows, *buffers, load)
        assert load.tolist() == quota_SP.sum(0).reshape(world, -1).sum(1).tolist()
        output, computed = torch.full_like(hidden, -1), []
        for part in parts:
            dispatch = TokenDispatch(hidden, tokens, 1, torch.from_numpy(index), part, ranks.of(rank))
            dispatch.wait()
            rows = dispatch.received()
            ends = index[part.ends_at : part.ends_at + per_rank]
            assert ends.tolist() == part.slot_sizes[::-1].cumsum().tolist()
            expert = torch.from_numpy(np.repeat(phy2log_P[slots], part.slot_sizes))
            dispatch.send_back(100 * rows + expert[:, None])
            dispatch.wait()
            dispatch.combine(output, torch.full_like(hidden, 2.0))
            computed.append(rows[:, 0])
        results[rank] = torch.cat(computed), output[:, 0]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


EXAMPLE = [0, 2, 0, 0, 1, 0], [0, 3, 0, 2, 0, 0]
EXAMPLE_PLAN = np.array([0, 1, -1, 2, 3, 0])


def test_the_worked_example():
    sorted_both = [sort_on_host(one_hot(experts, 4)[:, None], None, 4) for experts in EXAMPLE]
    sorted_tokens, counts = zip(*sorted_both, strict=True)
    assert [tokens.tolist() for tokens in sorted_tokens] == [[0, 2, 3, 5, 4, 1], [0, 2, 4, 5, 3, 1]]
    counts_SE = torch.stack([both[0] for both in counts]).numpy()
    assert counts_SE.tolist() == [[4, 1, 1, 0], [4, 0, 1, 1]]
    quota_SP = split_by_quota(counts_SE, EXAMPLE_PLAN, 2)
    assert quota_SP.tolist() == [[4, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 3]]
    first = [first_token_of_slots(quota_P, EXAMPLE_PLAN) for quota_P in quota_SP]
    assert [first[0][slot] for slot in (0, 1, 3)] == [0, 4, 5]
    assert [first[1][slot] for slot in (0, 3, 4, 5)] == [0, 4, 5, 1]
    window, buffers = np.array([[0, 3]]), (np.array([0, 1, 3]), (1, 4))  # the replica slot uses its second buffer
    planned = [
        plan_dispatch(quota_SP, EXAMPLE_PLAN, rank, window, *buffers, np.zeros(2, dtype=np.int64)) for rank in (0, 1)
    ]
    parts = [part for _, (part,) in planned]
    assert [index[:6].tolist() for index, _ in planned] == [[5, 0, 1, 2, 3, 4], [0, 4, 5, 1, 2, 3]]
    assert [(part.num_sent, part.num_local, part.num_received) for part in parts] == [(1, 5, 1), (1, 5, 1)]
    assert [(part.send_sizes, part.receive_sizes) for part in parts] == [([0, 1], [0, 1]), ([1, 0], [1, 0])]
    assert planned[0][0][6:12].tolist() == [0, 1, 2, 3, 5, 4]  # rows by slot
    assert planned[0][0][12:18].tolist() == [0, 1, 2, 3, 5, 4]  # the inverse
    assert planned[0][0][18:].tolist() == [5, 6, 6, 6]  # ends of the buffers' rows
    assert parts[0].slot_sizes.tolist() == [5, 1, 0]
    assert {part.exchanged for part in parts} == {2}
    (rows, _), (others, _) = round_trip(EXAMPLE, quota_SP, EXAMPLE_PLAN)
    assert rows.tolist() == [0, 2, 3, 5, 1000, 4]
    assert others.tolist() == [1, 1003, 1001, 1002, 1004, 1005]


@given(data=st.data())
def test_under_any_quotas_each_token_is_computed_once_by_its_expert(data):
    world, per_rank, num_experts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), 4
    slots = st.lists(st.integers(-1, num_experts - 1), min_size=world * per_rank, max_size=world * per_rank)
    phy2log = data.draw(slots.filter(lambda drawn: max(drawn) >= 0))
    held = sorted({expert for expert in phy2log if expert >= 0})
    dropped = max(phy2log) + 1
    experts = [data.draw(st.lists(st.sampled_from([*held, dropped]), min_size=1, max_size=9)) for _ in range(world)]
    quota_SP = np.zeros((world, len(phy2log)), dtype=np.int64)
    for rank in range(world):
        for expert in experts[rank]:
            if expert != dropped:
                choices = [slot for slot, holds in enumerate(phy2log) if holds == expert]
                quota_SP[rank, data.draw(st.sampled_from(choices))] += 1
    results = round_trip(experts, quota_SP, np.array(phy2log), data.draw(st.booleans()))
    sent = sorted(1000.0 * rank + t for rank in range(world) for t, e in enumerate(experts[rank]) if e != dropped)
    assert sorted(chain.from_iterable(rows.tolist() for rows, _ in results)) == sent
    for rank, (_, output) in enumerate(results):
        for token, expert in enumerate(experts[rank]):
            expected = -1 if expert == dropped else 2 * (100 * (1000 * rank + token) + expert)
            assert output[token] == expected
