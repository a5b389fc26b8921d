"""Tier: the order of loads, eviction, cancelling, failures and closing; the test controls when each load finishes."""

import logging
import threading

import numpy as np
import pytest
import torch

from runtime.offload.expert_files import ReadCancelledError, never
from runtime.offload.memory import BufferPool, ExpertShape
from runtime.offload.tier import Tier

WAIT = 10  # seconds after which a test that hangs fails


class Gate:
    """A lower tier whose reads wait until the test allows them; the weights of an expert are its number."""

    def __init__(self):
        self.begun, self.allowed, self.broken = [], set(), set()
        self.change = threading.Condition()

    def has(self, key):
        return True

    def read(self, key, buffer, stop=never):
        with self.change:
            self.begun.append(key)
            self.change.notify_all()
            while key not in self.allowed:
                if stop():
                    raise ReadCancelledError
                self.change.wait(0.01)
            if key in self.broken:
                raise OSError(f"weights of {key} cannot be read")
        for tensor in buffer.tensors:
            tensor.fill_(key[1])

    def allow(self, *keys):
        with self.change:
            self.allowed.update(keys)
            self.change.notify_all()

    def wait_for(self, *keys):
        """Waits until exactly these reads have begun, in this order."""
        with self.change:
            assert self.change.wait_for(lambda: len(self.begun) >= len(keys), WAIT), self.begun
            assert self.begun == list(keys)


def key(expert):
    return 0, expert


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def make(gate):
    """A function that makes tiers over the gate; they are closed after the test."""
    made = []

    def make(buffers, loaders=1):
        pool = BufferPool(ExpertShape(((2, 3), (3, 2)), torch.float32), buffers, torch.device("cpu"))
        made.append(Tier("test", pool, gate, loaders))
        return made[-1]

    yield make
    for tier in made:
        tier.close()


def use(tier, *experts):
    """Requests and acquires experts, checks their weights, and returns them in the order of arrival."""
    keys, arrived = [key(expert) for expert in experts], []
    tier.request(keys)
    for buffer in tier.acquire(keys):
        assert all((tensor == buffer.key[1]).all() for tensor in buffer.tensors)
        arrived.append(buffer.key[1])
    return arrived


def settle(tier):
    """Waits until no load is running."""
    with tier._change:
        assert tier._change.wait_for(lambda: not tier._running, WAIT)


def test_resident_experts_are_acquired_first(make, gate):
    tier = make(4)
    gate.allow(key(2))
    use(tier, 2)
    keys = [key(1), key(2)]
    tier.request(keys)
    buffers = tier.acquire(keys)
    assert next(buffers).key == key(2)  # the load of 1 is not allowed yet
    gate.allow(key(1))
    assert next(buffers).key == key(1)
    assert (tier.stats.hits, tier.stats.late, tier.stats.misses) == (1, 0, 2)
    assert tier.stats.demand_bytes == 2 * 48


def test_prefetches_run_in_order_and_demand_loads_before_them(make, gate):
    tier = make(8)
    tier.plan(np.zeros((1, 8)), [key(5), key(3), key(4)])
    gate.wait_for(key(5))
    tier.request([key(7)])
    gate.allow(*map(key, range(8)))
    assert [buffer.key for buffer in tier.acquire([key(7)])] == [key(7)]
    gate.wait_for(key(5), key(7), key(3), key(4))
    settle(tier)
    assert use(tier, 3) == [3]
    assert (tier.stats.useful_prefetches, tier.stats.hits) == (1, 1)


def test_a_prefetch_evicts_only_an_expert_of_clearly_later_next_use(make, gate):
    gate.allow(*map(key, range(8)))
    tier = make(2)
    use(tier, 0, 1)
    next_use_LE = np.array([[1.0, 6.0, 3.0, 9.0, 5.5]])
    tier.plan(next_use_LE, [key(3), key(4), key(2)])  # victim 1: needed before 3, hardly after 4, well after 2
    gate.wait_for(key(0), key(1), key(2))
    settle(tier)
    assert [tier.has(key(expert)) for expert in range(5)] == [True, False, True, False, False]
    use(tier, 3)  # a demand load evicts 2, which has the latest next use: its prefetch was wasted
    assert [tier.has(key(expert)) for expert in range(4)] == [True, False, False, True]
    assert (tier.stats.prefetches, tier.stats.wasted_prefetches, tier.stats.precision) == (1, 1, 0.0)


def test_a_pinned_expert_is_not_evicted(make, gate):
    gate.allow(*map(key, range(8)))
    tier = make(1)
    keys = [key(0), key(1)]
    tier.request(keys)
    buffers = tier.acquire(keys)
    first = next(buffers)
    tier.plan(np.array([[9.0, 0.0, 0.0]]), [key(2)])
    gate.wait_for(key(0))  # no other load begins: the only buffer is in use
    assert (first.tensors[0] == first.key[1]).all()
    assert next(buffers).key == key(1)


def test_a_prefetch_that_is_no_candidate_any_more_is_cancelled_for_a_demand_load(make, gate):
    tier = make(4)
    tier.plan(np.zeros((1, 8)), [key(5)])
    gate.wait_for(key(5))
    gate.allow(key(6))
    tier.plan(np.zeros((1, 8)), [])
    assert use(tier, 6) == [6]  # the load of 5 is never allowed
    assert tier.stats.cancelled == 1
    assert not tier.has(key(5))


def test_a_prefetch_rests_while_a_demand_load_runs(make, gate):
    piece_read, demanded = threading.Event(), threading.Event()

    def read(key, buffer, stop):
        if key[1] == 5:
            assert demanded.wait(WAIT)
            assert not stop()  # between two pieces
            piece_read.set()
        else:
            demanded.set()
            rested.append(not piece_read.wait(0.1))

    rested, tier = [], make(4, loaders=2)
    gate.read = read
    tier.plan(np.zeros((1, 8)), [key(5)])
    tier.request([key(6)])
    assert [buffer.key for buffer in tier.acquire([key(6)])] == [key(6)]
    assert piece_read.wait(WAIT)
    assert rested == [True]
    settle(tier)
    assert tier.stats.prefetches == 1


def test_a_request_waits_for_a_running_prefetch_of_the_same_expert(make, gate):
    tier = make(4)
    tier.plan(np.zeros((1, 8)), [key(5)])
    gate.wait_for(key(5))
    tier.request([key(5)])
    gate.allow(key(5))
    assert [buffer.key for buffer in tier.acquire([key(5)])] == [key(5)]
    assert (tier.stats.late, tier.stats.misses, tier.stats.prefetches, tier.loads) == (1, 0, 1, 1)
    assert tier.stats.stall_ms > 0
    assert 0 <= tier.stats.hidden < 1


def test_loading_time_is_counted_between_loads_that_follow_each_other(make, gate):
    tier = make(4)
    gate.allow(key(1))
    tier.plan(np.zeros((1, 8)), [key(1), key(2)])
    gate.wait_for(key(1), key(2))  # 2 begins at once and is not allowed to finish
    assert tier.has(key(1))
    assert tier.stats.load_ms > 0


def test_a_failed_load_raises_for_its_caller_only_and_a_failed_prefetch_is_logged_once(make, gate, caplog):
    tier = make(4)
    gate.allow(*map(key, range(8)))
    gate.broken.add(key(3))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tier.plan(np.zeros((1, 8)), [key(3), key(2)])
            with tier._change:
                assert tier._change.wait_for(lambda: not tier._candidates and not tier._running, WAIT)
    assert [record.message for record in caplog.records] == [
        "prefetch of expert 3 of MoE layer 0 failed: weights of (0, 3) cannot be read"
    ]
    with pytest.raises(OSError, match=r"weights of \(0, 3\) cannot be read"):
        use(tier, 3, 1)
    assert use(tier, 2, 1) == [2, 1]
    gate.broken.clear()
    assert use(tier, 3) == [3]


def test_closing_cancels_loads_and_fails_waiting_callers(make, gate):
    tier, ended = make(4, loaders=2), []

    def wait():
        try:
            use(tier, 1, 2)
        except RuntimeError as error:
            ended.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    with gate.change:
        assert gate.change.wait_for(lambda: len(gate.begun) == 2, WAIT)
    tier.close()
    waiting.join(WAIT)
    assert ended == ["the test tier was closed while a caller waited for experts"]
    assert tier.pool.nbytes == 0
    assert not any(thread.is_alive() for thread in tier._threads)


def test_a_caller_that_stops_early_leaves_no_expert_pinned(make, gate):
    gate.allow(*map(key, range(8)))
    tier = make(2)
    keys = [key(0), key(1)]
    tier.request(keys)
    buffers = tier.acquire(keys)
    next(buffers)
    buffers.close()
    assert not tier._pinned
    assert use(tier, 4, 5, 6) == [4, 5, 6]
