"""ForecastPolicy, NeedProbability and LruFallback: forecasts are used as far as they prove reliable."""

import logging

import numpy as np
import pytest

from predictor.forecast import forecast_from_load
from runtime.offload.forecast_policy import ForecastPolicy, LruFallback
from runtime.offload.need_probability import NeedProbability
from runtime.offload.policy import NextUsePolicy

LOAD = np.array([[0.0, 0.7, 4.0], [0.0, 0.7, 4.0]])
FREQUENCY = np.full((2, 3), 0.25)


def forecast(load):
    return forecast_from_load(np.asarray(load, dtype=np.float64), made_at=0, source="test")


def test_a_forecast_decides_what_is_prefetched_first_and_evicted_last():
    policy = ForecastPolicy(2, 4)
    policy.expect(forecast([[9, 0, 0, 0], [0, 5, 9, 0]]))
    policy.begin()
    assert policy.prefetch_candidates() == [(0, 0), (1, 2), (1, 1)]
    assert np.unravel_index(policy.next_use().argmin(), (2, 4)) == (0, 0)
    policy.observe(0, [0], 0)
    policy.expect(forecast([[0, 9, 0, 0], [0, 0, 9, 0]]))
    assert policy.prefetch_candidates()[:2] == [(1, 2), (1, 1)]
    next_use_LE = policy.next_use()
    assert next_use_LE[0, 1] < next_use_LE[0, 0]  # the next batch needs expert 1, not 0


def test_buffers_are_worth_more_to_a_layer_that_needs_few_experts():
    policies = [ForecastPolicy(2, 16), NextUsePolicy(2, 16)]
    for policy in policies:
        for _ in range(100):
            policy.observe(0, list(range(9)), 0)
            policy.observe(1, [0], 0)
    weighed, plain = (policy.next_use()[:, 0] for policy in policies)
    assert weighed.tolist() == plain.tolist()  # nothing is forecast
    policies[0].expect(forecast(np.ones((2, 16))))
    assert policies[0].next_use()[:, 0].tolist() == pytest.approx([3 * plain[0], plain[1]], rel=0.01)


@pytest.mark.parametrize("step", [1, 0], ids=["decoder beside an encoder", "decoder-only"])
def test_steps_begin_with_the_frequency_of_use_and_learn_what_a_batch_s_forecast_says_of_them(step):
    policy = ForecastPolicy(2, 4)
    for number in range(20):
        policy.expect(forecast([[9, 9, 9, 9], [0, 0, 9, 9]]))
        policy.begin()
        policy.expect(forecast([[9, 9, 9, 9], [9, 9, 0, 0]]))
        policy.observe(0, [0], 0)
        if number == 0:
            assert set(policy.prefetch_candidates()[:2]) == {(1, 2), (1, 3)}
        policy.observe(1, [0], 0)
        for _ in range(3):
            if step == 0:
                policy.observe(0, [0], 0)
            policy.observe(1, [2], 0)
            if number == 0 and step == 1:
                assert policy.current()[1, 3] < 0.5
    probability_E = policy.upcoming()[1]  # of a step of this batch, not of the next batch, whose forecast differs
    assert probability_E[2] > 0.9
    assert (probability_E[:2] < 0.1).all()


def test_a_forecast_of_one_layer_s_next_run_is_trusted_once_it_proved_right_and_gone_once_that_ran():
    rng, policy = np.random.default_rng(0), LruFallback(ForecastPolicy(2, 8), 2, 8, buffers=9)
    for number in range(31):
        policy.expect(forecast(np.full((2, 8), 0.5)))
        policy.begin()
        policy.observe(0, [0], 0)
        known, expert = policy.prefetch_candidates(), int(rng.integers(8))
        policy.foresee(1, 3.0 * np.eye(8)[expert])
        if number == 0:
            assert policy.prefetch_candidates() == known
        if number == 30:
            assert policy.prefetch_candidates()[0] == (1, expert)
            assert policy.next_use()[1].argmin() == expert
        policy.observe(1, [expert], 0)
    ahead = policy.policy
    assert ahead.next_run(ahead.layer_order.distances()[1])[1, expert] < 0.5


def test_need_probability_starts_near_the_poisson_distribution():
    probability_LE = NeedProbability(2).probability(LOAD, FREQUENCY)
    np.testing.assert_allclose(probability_LE[0], [0.02, 1 - np.exp(-0.7), 1 - np.exp(-4)], atol=0.2)
    assert (np.diff(probability_LE[0]) > 0).all()


def test_need_probability_is_fitted_for_each_layer():
    need = NeedProbability(2)
    first = need.probability(LOAD, FREQUENCY)
    for _ in range(200):
        need.observe(0, LOAD[0], FREQUENCY[0], np.array([1.0, 0.0, 0.0]))
    after = need.probability(LOAD, FREQUENCY)
    assert (after[0] > 0.9).tolist() == [True, False, False]
    assert (after[0, 1:] < 0.1).all()
    assert np.array_equal(after[1], first[1])


def test_useless_forecasts_leave_the_frequency_of_use():
    rng, need = np.random.default_rng(0), NeedProbability(1)
    frequency = np.repeat([[0.1, 0.9]], 32, axis=-1)
    for _ in range(100):
        need.observe(0, rng.exponential(size=64), frequency[0], (rng.uniform(size=64) < frequency[0]).astype(float))
    probability = need.probability(rng.exponential(size=(1, 64)), frequency)
    np.testing.assert_allclose(probability, frequency, atol=0.1)


def test_need_probability_adapts_to_a_forecaster_that_reverses():
    rng, need = np.random.default_rng(0), NeedProbability(1)
    for step in range(120):
        needed = rng.uniform(size=64) < 0.3
        load = np.where(needed == (step < 60), 20.0, 0.0)
        need.observe(0, load, np.full(64, 0.3), needed.astype(float))
    probability = need.probability(load[None], np.full((1, 64), 0.3))[0]
    assert (probability[needed] > 0.8).all()
    assert (probability[~needed] < 0.2).all()


class WrongPolicy(NextUsePolicy):
    """Evicts what was used last, and always prefetches the same expert."""

    name = "wrong"

    def next_use(self):
        return self.last_LE.astype(np.float64)

    def prefetch_candidates(self):
        return [(0, 0)]


def test_lru_replaces_a_policy_that_costs_more_and_logs_it(caplog):
    policy = LruFallback(WrongPolicy(1, 8), 1, 8, buffers=4)
    costs = 0
    with caplog.at_level(logging.WARNING):
        for _ in range(20):  # four experts in four buffers: LRU misses none after the first round
            costs += 4
            policy.observe(0, [0, 1, 2, 3], costs)
            if policy.suspended:
                break
    assert (policy.suspended, policy.fallbacks) == (True, 1)
    assert policy.prefetch_candidates() == []
    assert policy.next_use()[0, 0] < 0  # least recently used
    assert "cache policy 'wrong' missed or wasted" in caplog.text
    assert "LRU would have missed 3;" in caplog.text
    for _ in range(20):
        policy.observe(0, [0, 1, 2, 3], costs)
        if not policy.suspended:
            break
    assert not policy.suspended  # the policy is tried again
    assert policy.prefetch_candidates() == [(0, 0)]


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_a_policy_as_good_as_lru_is_not_replaced(factor):
    policy, costs = LruFallback(NextUsePolicy(1, 8), 1, 8, buffers=2), 0.0
    for step in range(200):
        costs += 2 * factor
        policy.observe(0, [step % 4, 4 + step % 4], int(costs))
    assert policy.fallbacks == 0
