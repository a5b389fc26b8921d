"""Policies without forecasts: LRU, and the rivals of the benchmarks (LFU, last batch, cosine, oracle)."""

import numpy as np

from benchmarks.support.policies import CosinePolicy, LastBatchPolicy, LfuPolicy, OraclePolicy
from runtime.offload.policy import LruPolicy


def by_next_use(policy):
    """Experts in the order of their next use, the soonest first."""
    next_use_LE = policy.next_use()
    return [tuple(map(int, np.unravel_index(index, next_use_LE.shape))) for index in np.argsort(next_use_LE, axis=None)]


def run_pass(policy, needed):
    """Runs one batch, in which each layer needs these experts."""
    policy.begin()
    for layer, experts in enumerate(needed):
        policy.observe(layer, experts, 0)


def test_lru_and_lfu_evict_the_least_recently_and_the_least_frequently_used():
    recent, frequent = LruPolicy(1, 3), LfuPolicy(1, 3)
    for policy in (recent, frequent):
        for experts in ([1], [1], [1], [0], [0], [2]):
            policy.observe(0, experts, 0)
        assert policy.prefetch_candidates() == []
    assert by_next_use(recent) == [(0, 2), (0, 0), (0, 1)]
    assert by_next_use(frequent) == [(0, 1), (0, 0), (0, 2)]


def test_the_oracle_knows_each_next_use():
    truth = np.zeros((3, 2, 3), dtype=bool)
    truth[0, 0, 0] = truth[0, 1, 1] = truth[1, 0, 2] = truth[2, 1, 1] = True
    oracle = OraclePolicy(truth)
    oracle.begin()
    assert oracle.prefetch_candidates() == [(0, 0), (1, 1), (0, 2)]
    oracle.observe(0, [0], 0)
    next_use_LE = oracle.next_use()
    assert next_use_LE[1, 1] == 1  # the next layer
    assert next_use_LE[0, 2] == 2  # the next batch's first layer
    assert np.isinf(next_use_LE[0, 0])
    oracle.observe(1, [1], 0)
    assert oracle.next_use()[1, 1] == 4
    oracle.begin()
    oracle.begin()
    oracle.begin()
    assert oracle.prefetch_candidates() == []


def test_last_batch_prefetches_what_the_last_batch_needed_in_the_order_of_layers():
    policy = LastBatchPolicy(3, 4)
    run_pass(policy, [[0, 1], [2], [3]])
    policy.begin()
    policy.observe(0, [3], 0)
    assert policy.prefetch_candidates() == [(1, 2), (2, 3), (0, 3)]


def test_cosine_predicts_what_the_most_similar_batch_needed():
    policy = CosinePolicy(2, 4)
    run_pass(policy, [[0, 1], [0]])
    run_pass(policy, [[2, 3], [3]])
    policy.begin()
    policy.observe(0, [0, 1], 0)
    assert policy.prefetch_candidates()[0] == (1, 0)  # as in the first batch
    assert (0, 2) in policy.prefetch_candidates()  # and then the second one came
    policy = CosinePolicy(2, 4)
    run_pass(policy, [[0, 1], [0]])
    run_pass(policy, [[2, 3], [3]])
    policy.begin()
    policy.observe(0, [2, 1], 0)
    policy.observe(1, [3], 0)
    assert policy._nearest() == 1
