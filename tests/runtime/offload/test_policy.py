"""What policies expect: schedules learned from the layers that ran, Belady's choice, calibration, and giving way."""

import logging

import numpy as np
import pytest

from predictor.forecast import forecast_from_load
from runtime.offload.forecast_policy import ForecastPolicy, LruFallback, NeedProbability
from runtime.offload.layer_order import UNSEEN_DISTANCE, LayerOrder
from runtime.offload.policy import CosinePolicy, LastBatchPolicy, LfuPolicy, LruPolicy, NextUsePolicy, OraclePolicy


def forecast(load):
    return forecast_from_load(np.asarray(load, dtype=np.float64), made_at=0, source="test")


def order(policy):
    """Experts from the one due first to the one due last."""
    due = policy.next_use()
    return [(int(index) // due.shape[1], int(index) % due.shape[1]) for index in np.argsort(due, axis=None)]


def run_pass(policy, needed):
    """One batch: what each layer needs."""
    policy.begin()
    for layer, experts in enumerate(needed):
        policy.observe(layer, experts, 0)


def test_distances_in_a_batch_and_across_its_end():
    schedule = LayerOrder(4)
    schedule.begin()
    assert schedule.ahead()[0].tolist() == [1, 2, 3, 4]
    schedule.observe(0)
    schedule.observe(1)
    distance, now, period = schedule.ahead()
    assert distance.tolist() == [3, 4, 1, 2]
    assert now.tolist() == [False, False, True, True]
    assert period.tolist() == [4] * 4
    assert (schedule.number, schedule.started) == (0, 0)


def test_an_encoder_alone_is_learned_from_one_pass():
    schedule = LayerOrder(4)
    for _ in range(2):
        schedule.begin()
        schedule.observe(0)
        schedule.observe(1)
    assert schedule.length == 2
    assert schedule.ahead()[0].tolist() == [1, 2, 2 + 2 * UNSEEN_DISTANCE, 3 + 2 * UNSEEN_DISTANCE]


def test_decoder_steps_are_passes_of_their_own():
    schedule = LayerOrder(4)
    schedule.begin()
    for layer in (0, 1, 2, 3, 2):
        schedule.observe(layer)
    distance, now, _ = schedule.ahead()
    assert (schedule.number, schedule.started, schedule.length) == (1, 2, 2)
    assert distance[2:].tolist() == [2, 1]
    assert now.tolist() == [False, False, False, True]
    assert (distance[:2] > 10).all()
    for layer in (3, 2, 3):
        schedule.observe(layer)
    schedule.begin()
    assert schedule.ahead()[0].tolist() == [1, 2, 3, 4]


def test_while_the_decoder_writes_the_encoder_is_as_far_off_as_it_usually_is():
    schedule = LayerOrder(4)
    for _ in range(3):  # batches of an encoder pass and ten decoder steps
        schedule.begin()
        for layer in [0, 1] + [2, 3] * 10:
            schedule.observe(layer)
    schedule.begin()
    for layer in (0, 1, 2, 3, 2, 3, 2):
        schedule.observe(layer)
    distance, _, period = schedule.ahead()
    assert distance.tolist() == [22 - 6, 22 - 5, 2, 1]  # 22 layers a batch
    assert period.tolist() == [22, 22, 2, 2]
    for _ in range(20):  # more steps than usual: not before the next step is over
        schedule.observe(3)
        schedule.observe(2)
    assert schedule.ahead()[0].tolist() == [4, 4, 2, 1]


def test_least_recent_and_least_frequent():
    recent, frequent = LruPolicy(1, 3), LfuPolicy(1, 3)
    for policy in (recent, frequent):
        for experts in ([1], [1], [1], [0], [0], [2]):
            policy.observe(0, experts, 0)
        assert policy.prefetch_candidates() == []
    assert order(recent) == [(0, 2), (0, 0), (0, 1)]
    assert order(frequent) == [(0, 1), (0, 0), (0, 2)]


def test_the_oracle_knows_each_next_use():
    truth = np.zeros((3, 2, 3), dtype=bool)
    truth[0, 0, 0] = truth[0, 1, 1] = truth[1, 0, 2] = truth[2, 1, 1] = True
    oracle = OraclePolicy(truth)
    oracle.begin()
    assert oracle.prefetch_candidates() == [(0, 0), (1, 1), (0, 2)]
    oracle.observe(0, [0], 0)
    due = oracle.next_use()
    assert due[1, 1] == 1  # the next layer
    assert due[0, 2] == 2  # the next batch's first layer
    assert np.isinf(due[0, 0])
    oracle.observe(1, [1], 0)
    assert oracle.next_use()[1, 1] == 4
    oracle.begin()
    oracle.begin()
    oracle.begin()
    assert oracle.prefetch_candidates() == []


def test_like_last_wishes_for_what_the_last_batch_needed_in_the_order_of_layers():
    policy = LastBatchPolicy(3, 4)
    run_pass(policy, [[0, 1], [2], [3]])
    policy.begin()
    policy.observe(0, [3], 0)
    assert policy.prefetch_candidates() == [(1, 2), (2, 3), (0, 3)]


def test_like_nearest_follows_the_most_similar_batch():
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


def test_a_forecast_decides_what_is_fetched_first_and_kept_longest():
    policy = ForecastPolicy(2, 4)
    policy.expect(forecast([[9, 0, 0, 0], [0, 5, 9, 0]]))
    policy.begin()
    assert policy.prefetch_candidates() == [(0, 0), (1, 2), (1, 1)]
    assert order(policy)[0] == (0, 0)
    policy.observe(0, [0], 0)
    policy.expect(forecast([[0, 9, 0, 0], [0, 0, 9, 0]]))
    assert policy.prefetch_candidates()[:2] == [(1, 2), (1, 1)]
    due = policy.next_use()
    assert due[0, 1] < due[0, 0]  # the coming batch needs 1, and 0 no longer


def test_a_forecast_of_a_batch_says_nothing_of_a_decoder_step():
    policy = ForecastPolicy(2, 4)
    policy.expect(forecast([[9, 9, 9, 9], [9, 9, 9, 9]]))
    policy.begin()
    for layer in (0, 1, 1):
        policy.observe(layer, [0], 0)
    assert policy.prefetch_candidates() == []
    assert np.array_equal(policy.current(), policy.usual_LE)


LOAD = np.array([[0.0, 0.7, 4.0], [0.0, 0.7, 4.0]])
USUAL = np.full((2, 3), 0.25)


def test_calibration_begins_near_the_poisson_distribution():
    chance = NeedProbability(2).probability(LOAD, USUAL)
    np.testing.assert_allclose(chance[0], [0.02, 1 - np.exp(-0.7), 1 - np.exp(-4)], atol=0.2)
    assert (np.diff(chance[0]) > 0).all()


def test_calibration_follows_what_comes_true_layer_by_layer():
    calibration = NeedProbability(2)
    first = calibration.probability(LOAD, USUAL)
    for _ in range(200):
        calibration.observe(0, LOAD[0], USUAL[0], np.array([1.0, 0.0, 0.0]))
    after = calibration.probability(LOAD, USUAL)
    assert (after[0] > 0.9).tolist() == [True, False, False]
    assert (after[0, 1:] < 0.1).all()
    assert np.array_equal(after[1], first[1])


def test_where_forecasts_say_nothing_what_is_usual_counts():
    rng, calibration = np.random.default_rng(0), NeedProbability(1)
    usual = np.repeat([[0.1, 0.9]], 32, axis=-1)
    for _ in range(100):
        calibration.observe(0, rng.exponential(size=64), usual[0], (rng.uniform(size=64) < usual[0]).astype(float))
    chance = calibration.probability(rng.exponential(size=(1, 64)), usual)
    np.testing.assert_allclose(chance, usual, atol=0.1)


def test_calibration_recovers_from_a_forecaster_that_turns_around():
    rng, calibration = np.random.default_rng(0), NeedProbability(1)
    for step in range(120):
        needed = rng.uniform(size=64) < 0.3
        load = np.where(needed == (step < 60), 20.0, 0.0)
        calibration.observe(0, load, np.full(64, 0.3), needed.astype(float))
    chance = calibration.probability(load[None], np.full((1, 64), 0.3))[0]
    assert (chance[needed] > 0.8).all()
    assert (chance[~needed] < 0.2).all()


class Wrong(NextUsePolicy):
    """Keeps what was not used lately, prefetch_candidates for anything."""

    name = "wrong"

    def next_use(self):
        return self.last_LE.astype(np.float64)

    def prefetch_candidates(self):
        return [(0, 0)]


def test_a_policy_that_costs_more_than_lru_gives_way_and_says_so(caplog):
    policy = LruFallback(Wrong(1, 8), 1, 8, places=4)
    costs = 0
    with caplog.at_level(logging.WARNING):
        for _ in range(20):  # four experts for four places: the rival has all it needs
            costs += 4
            policy.observe(0, [0, 1, 2, 3], costs)
            if policy.suspended:
                break
    assert (policy.suspended, policy.fallbacks) == (True, 1)
    assert policy.prefetch_candidates() == []
    assert policy.next_use()[0, 0] < 0  # least recently used
    assert "'wrong' missed or wasted" in caplog.text
    assert "least-recently-used misses 3" in caplog.text
    for _ in range(20):
        policy.observe(0, [0, 1, 2, 3], costs)
        if not policy.suspended:
            break
    assert not policy.suspended  # given another chance
    assert policy.prefetch_candidates() == [(0, 0)]


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_a_policy_as_good_as_lru_is_left_alone(factor):
    policy, costs = LruFallback(NextUsePolicy(1, 8), 1, 8, places=2), 0.0
    for step in range(200):
        costs += 2 * factor
        policy.observe(0, [step % 4, 4 + step % 4], int(costs))
    assert policy.fallbacks == 0
