"""A forecaster that learns while it serves: its correction, its mixture, its spread, and its state on disk."""

import numpy as np
import pytest
import torch

from data.traces.loads import share_of, total_variation
from data.traces.trace import TokenBatch
from predictor.adaptive import MIXED, PENDING, UNIT, AdaptiveForecaster
from predictor.baselines.history import Ema
from predictor.checkpoint import STATE, load_adaptive, save_predictor, save_state
from predictor.correction import STRENGTH, CorrectionMemory, attributed
from predictor.forecast import OnlineForecaster, SequenceForecast, forecast_from_load
from predictor.forecaster import NeuralForecaster
from predictor.head import LearningHead
from predictor.network import Architecture, LoadNetwork

LAYERS, EXPERTS, LENGTH = 2, 8, 64


def batch(first: int, sequences: int = 4, requests: list[int] | None = None) -> TokenBatch:
    ids = torch.full((sequences, LENGTH), first)
    numbers = None if requests is None else torch.tensor(requests)
    return TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), None, numbers)


class Topics:
    """Forecasts by topic, the batch's first token: what the topics' sequences are expected to do, `[topics, L, E]`."""

    name = "topics"

    def __init__(self, share: np.ndarray) -> None:
        self.share = share

    def forecast_by_sequence(self, upcoming, history):
        load = np.repeat(LENGTH * self.share[upcoming.input_ids[0, 0]][None], len(upcoming.input_ids), 0)
        parts = SequenceForecast(load.astype(np.float32), np.zeros((len(load), 0), np.float32))
        return forecast_from_load(load.sum(0), made_at=len(history), source=self.name), parts

    def forecast(self, upcoming, history):
        return self.forecast_by_sequence(upcoming, history)[0]


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def drawn(random, share, sequences=4):
    """Loads of sequences drawn from a share `[L, E]`, `[B, L, E]`."""
    return random.multinomial(LENGTH, np.broadcast_to(share, (sequences, *share.shape)))


def stream(random, adaptive, truth, topics):
    """Serves a batch of each topic; returns errors, forecasts and true shares."""
    history, forecasts, shares = np.zeros((0, LAYERS, EXPERTS), dtype=np.int64), [], []
    for topic in topics:
        tokens, loads = batch(topic), drawn(random, truth[topic])
        forecasts.append(adaptive.forecast(tokens, history))
        adaptive.observe(tokens, loads.sum(0), loads)
        history = np.concatenate([history, loads.sum(0)[None]])
        shares.append(share_of(loads.sum(0)))
    errors = [total_variation(made.share, share).mean() for made, share in zip(forecasts, shares, strict=True)]
    return np.array(errors), forecasts, np.stack(shares)


def test_one_topic_is_corrected_without_harm_to_another(random):
    said = random.dirichlet(np.full(EXPERTS, 0.5), (2, LAYERS))
    truth = np.stack([np.roll(said[0], 3, axis=-1), said[1]])  # topic 0 is forecast wrongly, topic 1 rightly
    wrapped = Topics(said)
    errors, _, _ = stream(random, AdaptiveForecaster(wrapped, LAYERS, EXPERTS), truth, [0, 1] * 10)
    wrong = total_variation(said[0], truth[0]).mean()
    assert errors[0] > 0.8 * wrong
    assert errors[6::2].max() < 0.5 * wrong, "corrected as soon as the topic returns"
    assert errors[3::2].mean() < 0.12, "right forecasts stay"


def test_a_forecast_that_was_right_for_long_is_left_at_once_where_corrections_contradict_it(random):
    said = random.dirichlet(np.full(EXPERTS, 0.5), (2, LAYERS))
    truth = np.stack([np.roll(said[0], 3, axis=-1), said[1]])  # topic 0 is forecast wrongly, topic 1 rightly
    adaptive = AdaptiveForecaster(Topics(said), LAYERS, EXPERTS)
    stream(random, adaptive, truth, [1] * 30)
    errors, _, _ = stream(random, adaptive, truth, [0] * 4)
    wrong = total_variation(said[0], truth[0]).mean()
    assert errors[0] > 0.8 * wrong, "the first batch of another kind cannot be foreseen"
    assert errors[1] < 0.5 * wrong
    known, errors_known = adaptive.known.mixture.weight.copy(), adaptive.known.mixture.errors.copy()
    stream(random, adaptive, truth, [0] * 4)
    assert (adaptive.known.mixture.weight == known).all(), "contested batches teach the others nothing"
    assert (adaptive.known.mixture.errors == errors_known).all()


def test_the_best_free_rival_is_followed_where_tokens_tell_nothing(random):
    said = random.dirichlet(np.ones(EXPERTS), (8, LAYERS))
    truth = np.repeat(random.dirichlet(np.ones(EXPERTS), (1, LAYERS)), 8, axis=0)
    errors, _, _ = stream(random, AdaptiveForecaster(Topics(said), LAYERS, EXPERTS), truth, list(range(8)) * 5)
    history, rival = np.zeros((0, LAYERS, EXPERTS), dtype=np.int64), []
    for _ in range(40):
        load = drawn(random, truth[0]).sum(0)
        if len(history):
            rival.append(total_variation(Ema().forecast(None, history).share, share_of(load)).mean())
        history = np.concatenate([history, load[None]])
    assert errors[20:].mean() < np.mean(rival[20:]) + 0.01


@pytest.mark.parametrize("noise", [0.02, 0.6])
def test_intervals_hold_as_often_as_they_say(random, noise):
    truth = random.dirichlet(np.ones(EXPERTS), (60, LAYERS))
    said = share_of(truth * np.exp(noise * random.standard_normal(truth.shape)))
    _, forecasts, shares = stream(random, AdaptiveForecaster(Topics(said), LAYERS, EXPERTS), truth, list(range(60)))
    held = [np.abs(made.share - share) <= 1.2816 * made.spread for made, share in zip(forecasts, shares, strict=True)]
    assert 0.74 <= np.mean(held[10:]) <= 0.86


def test_requests_are_corrected_by_their_own_sequences():
    memory = CorrectionMemory(1, 4)
    said = np.full((2, 1, 4), 25, dtype=np.float32)
    observed = np.array([[[70, 10, 10, 10]], [[10, 70, 10, 10]]], dtype=np.float32)
    memory.add(said[None], observed, np.array([7, 8]))
    known = memory.correct(said[None], np.array([7, 9]))[0][0]
    assert known[0, 0, 0] > known[1, 0, 0] > 25, "its own past counts in full, similar sequences beside it"
    assert np.allclose(known.sum(-1), 100)
    unnamed, plain = (memory.correct(said[None], numbers)[0][0] for numbers in (np.array([-1, 9]), None))
    assert np.allclose(unnamed[0], plain[0]), "no request is not one"


def test_the_correction_is_a_ratio_with_the_forecast_as_prior():
    memory = CorrectionMemory(1, 2)
    said, observed = np.array([[[50.0, 50.0]]], np.float32), np.array([[[80.0, 20.0]]], np.float32)
    memory.add(said[None], observed)
    prior = STRENGTH / 2
    ratio = np.array([80 + prior, 20 + prior]) / (50 + prior)
    cautious, bold = (loads[0] for loads in memory.correct(said[None]))
    assert np.allclose(cautious[0, 0], 100 * 50 * ratio / (50 * ratio).sum(), rtol=2e-3)
    assert bold[0, 0, 0] > cautious[0, 0, 0]


def test_the_memory_is_bounded_and_keeps_the_newest():
    memory = CorrectionMemory(1, 2)
    for number in range(memory.capacity // 100 + 2):
        memory.add(np.ones((1, 100, 1, 2), np.float32), np.full((100, 1, 2), number, np.float32))
    kept = memory.state()["observed"]
    assert len(memory) == len(kept) == memory.capacity
    assert (np.diff(kept[:, 0, 0]) >= 0).all()
    assert kept[-1, 0, 0] == memory.capacity // 100 + 1
    assert CorrectionMemory(60, 512).capacity < memory.capacity, "large models get fewer sequences"


def test_forecasters_are_corrected_side_by_side(random):
    said, other = random.uniform(1, 9, (2, 6, LAYERS, EXPERTS)).astype(np.float32)
    observed = random.uniform(1, 9, (6, LAYERS, EXPERTS)).astype(np.float32)
    alone, both = CorrectionMemory(LAYERS, EXPERTS), CorrectionMemory(LAYERS, EXPERTS, num_forecasters=2)
    alone.add(said[None], observed)
    both.add(np.stack([said, other]), observed)
    for one, two in zip(alone.correct(said[None]), both.correct(np.stack([said, other])), strict=True):
        assert np.allclose(one[0], two[0], rtol=1e-4), "the first is corrected as if it were alone"
        assert (
            total_variation(share_of(two[1]), share_of(observed)).mean()
            < 0.9 * total_variation(share_of(other), share_of(observed)).mean()
        ), "the second by its own ratios"


def text(random, truth, direction, sequences=16):
    """Features and loads of sequences whose shares move from the forecast along a direction, by their first feature."""
    features = random.standard_normal((sequences, 4)).astype(np.float32)
    share = share_of(np.maximum(truth + features[:, :1, None] * direction, 0))
    return features, np.stack([random.multinomial(LENGTH, each) for each in share]).astype(np.float32)


def test_the_head_learns_from_features_what_a_batchs_mean_cannot_tell(random):
    said = np.full((LAYERS, EXPERTS), 1 / EXPERTS)
    direction = 0.6 / EXPERTS * random.choice([-1, 1], (LAYERS, EXPERTS))
    head = LearningHead(LAYERS, EXPERTS)
    forecast = np.full((16, LAYERS, EXPERTS), LENGTH / EXPERTS, np.float32)
    errors = []
    for _ in range(60):
        features, loads = text(random, said, direction)
        corrected = head.correct(forecast, features)
        assert np.allclose(corrected.sum(-1), LENGTH, rtol=1e-4)
        errors.append([total_variation(share_of(each), share_of(loads)).mean() for each in (forecast, corrected)])
        head.learn(forecast, loads, features)
    assert errors[0][0] == errors[0][1], "nothing is corrected before the first batch"
    before, after = np.mean(errors[30:], axis=0)
    assert after < 0.8 * before
    size = [value.nbytes for value in head.state().values()]
    head.learn(forecast, loads, features)
    assert [value.nbytes for value in head.state().values()] == size, "memory is bounded"


class Described:
    """Expects the same of all sequences, and describes each by what the test puts into `features`."""

    name = "described"

    def forecast_by_sequence(self, upcoming, history):
        load = np.full((len(self.features), LAYERS, EXPERTS), LENGTH / EXPERTS, np.float32)
        parts = SequenceForecast(load, self.features)
        return forecast_from_load(load.sum(0, dtype=np.float64), made_at=len(history), source=self.name), parts


def test_batches_are_told_apart_by_features_where_forecasts_are_alike(random):
    wrapped, direction = Described(), 0.6 / EXPERTS * random.choice([-1, 1], (LAYERS, EXPERTS))
    adaptive, history = AdaptiveForecaster(wrapped, LAYERS, EXPERTS), np.zeros((0, LAYERS, EXPERTS), dtype=np.int64)
    errors = []
    for number in range(60):
        features = np.full((16, 1), (-1) ** (number // 3), np.float32)  # the text changes every three batches
        share = share_of(np.maximum(1 / EXPERTS + features[:, :, None] * direction, 0))
        loads = random.multinomial(LENGTH, share)
        wrapped.features, tokens = features, batch(number, 16)
        forecast = adaptive.forecast(tokens, history)
        errors.append(total_variation(forecast.share, share_of(loads.sum(0))).mean())
        adaptive.observe(tokens, loads.sum(0), loads)
        history = np.concatenate([history, loads.sum(0)[None]])
    assert np.mean(errors[30::3]) < 0.3 * total_variation(share[0], np.full_like(share[0], 1 / EXPERTS)).mean()


def test_a_layer_without_load_changes_no_head():
    head, features = LearningHead(2, 4), np.ones((3, 1), np.float32)
    said, observed = np.full((3, 2, 4), 8, np.float32), np.zeros((3, 2, 4), np.float32)
    observed[:, 0, 0] = 32
    for _ in range(100):
        head.learn(said, observed, features)
    corrected = head.correct(said, features)
    assert corrected[0, 0, 0] > 8
    assert np.allclose(corrected[:, 1], 8)


def test_a_batchs_load_is_attributed_to_its_sequences():
    said = np.array([[[30, 10]], [[10, 30]]], dtype=np.float32)
    load = np.array([[60, 20]])
    parts = attributed(said, load)
    assert np.allclose(parts.sum(0), load, atol=2)
    assert (parts[0] / said[0])[0].tolist() == pytest.approx((parts[1] / said[1])[0].tolist())


def test_short_sequences_are_corrected_together(random):
    adaptive = AdaptiveForecaster(Topics(random.dirichlet(np.ones(EXPERTS), (1, LAYERS))), LAYERS, EXPERTS)
    ids = torch.zeros(2 * UNIT, 1, dtype=torch.int64)
    tokens = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), None, torch.arange(2 * UNIT))
    adaptive.forecast(tokens, np.zeros((0, LAYERS, EXPERTS), dtype=np.int64))
    adaptive.observe(tokens, np.full((LAYERS, EXPERTS), 8), np.ones((2 * UNIT, LAYERS, EXPERTS), np.int64))
    assert len(adaptive.memory) == 2


def test_late_and_missing_observations(random):
    said = random.dirichlet(np.ones(EXPERTS), (9, LAYERS))
    adaptive = AdaptiveForecaster(Topics(said), LAYERS, EXPERTS)
    assert isinstance(adaptive, OnlineForecaster)
    nothing = np.zeros((0, LAYERS, EXPERTS), dtype=np.int64)
    batches = [batch(topic) for topic in range(9)]
    load = drawn(random, said[0]).sum(0)
    adaptive.observe(batches[0], load)  # was not forecast
    assert not len(adaptive.memory)
    for tokens in batches[:3]:
        adaptive.forecast(tokens, nothing)
    copy = TokenBatch(batches[1].input_ids.clone(), batches[1].mask.clone())
    adaptive.observe(copy, load)  # batch 0 was never observed
    adaptive.observe(batches[0], load)
    assert len(adaptive.memory) == 4
    for tokens in batches:
        adaptive.forecast(tokens, nothing)
    assert len(adaptive._pending) == PENDING


def test_a_layer_without_load_teaches_nothing(random):
    said = random.dirichlet(np.ones(EXPERTS), (1, LAYERS))
    adaptive = AdaptiveForecaster(Topics(said), LAYERS, EXPERTS)
    history = np.zeros((0, LAYERS, EXPERTS), dtype=np.int64)
    for _ in range(6):
        adaptive.forecast(batch(0), history)
        load = drawn(random, said[0][:, ::-1]).sum(0)
        load[1] = 0
        adaptive.observe(batch(0), load)
        history = np.concatenate([history, load[None]])
    assert np.allclose(adaptive.known.mixture.weight[1], adaptive.known.mixture.first[1])
    assert adaptive.known.spread.log_factor[1] == 0
    assert not np.allclose(adaptive.known.mixture.weight[0], adaptive.known.mixture.first[0])


@pytest.fixture
def served(layout, host, tmp_path, random):
    """A predictor's folder, its forecaster after three batches, and a batch to forecast."""
    torch.manual_seed(0)
    network = LoadNetwork(layout, Architecture(width=8, depth=1))
    table = torch.randn(layout.vocab_size, layout.d_model)
    learned = NeuralForecaster(layout, network, table, torch.ones(2, layout.num_layers, 3))
    save_predictor(tmp_path / "p", learned)
    adaptive = AdaptiveForecaster(learned, *learned.shape)
    history = random.integers(0, 90, (4, *learned.shape))
    for step in range(1, 4):
        tokens = batch(step)
        adaptive.forecast(tokens, history[:step])
        adaptive.observe(tokens, history[step])
    return tmp_path / "p", adaptive, table, history


def test_a_warm_start_goes_on_where_the_state_ended(served, layout):
    folder, adaptive, table, history = served
    cold = load_adaptive(folder, layout, table)
    save_state(folder, adaptive.state())
    warm = load_adaptive(folder, layout, table)
    ours, theirs = (one.forecast(batch(2), history) for one in (adaptive, warm))
    assert ours.source == "adaptive"
    assert np.allclose(ours.share, theirs.share)
    assert np.allclose(ours.spread, theirs.spread)
    assert not np.allclose(cold.forecast(batch(2), history).share, ours.share)
    unknown = [one.forecast(None, history).share for one in (adaptive, warm)]
    assert np.allclose(*unknown)


def test_a_state_of_an_earlier_version_has_no_contested_part(served, layout):
    folder, adaptive, table, history = served
    state = {name: value for name, value in adaptive.state().items() if not name.startswith("contested.")}
    save_state(folder, state)
    warm = load_adaptive(folder, layout, table)
    ours, theirs = (one.forecast(batch(2), history) for one in (adaptive, warm))
    assert np.allclose(ours.share, theirs.share)


def test_a_state_of_another_model_is_refused(served, layout, tmp_path):
    folder, adaptive, table, _ = served
    state = adaptive.state()
    save_state(folder, state)
    learned = adaptive.wrapped
    learned.network.enter.bias.data += 1
    save_predictor(folder, learned)
    with pytest.raises(ValueError, match=r"weights_sha256 .* another model's; delete the file"):
        load_adaptive(folder, layout, table)
    save_state(folder, state | {"known.weight": state["known.weight"][:, : len(MIXED) - 1]})
    with pytest.raises(ValueError, match=r"known.weight has shape \(3, 9\), expected finite numbers \(3, 10\)"):
        load_adaptive(folder, layout, table)
    save_state(folder, state | {"memory.observed": np.full_like(state["memory.observed"], np.nan)})
    with pytest.raises(ValueError, match=r"memory.observed has shape"):
        load_adaptive(folder, layout, table)
    save_state(folder, {name: value for name, value in state.items() if name != "memory.forecast"})
    with pytest.raises(ValueError, match=r"forecast"):
        load_adaptive(folder, layout, table)
    (folder / STATE).write_bytes(b"x" * 40)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_adaptive(folder, layout, table)
