"""Trust passes to past loads as a batch's tokens grow unfamiliar."""

import numpy as np
import pytest
import torch

from data.traces.trace import pad_tokens
from predictor.checkpoint import load_predictor, save_predictor
from predictor.familiarity import MIN_OCCURRENCES, STEEPNESS, Familiarity
from predictor.forecaster import NeuralForecaster
from predictor.network import Architecture, LoadNetwork


def batch(*ids):
    return pad_tokens([np.array(ids)], pad=0)


@pytest.fixture
def familiarity():
    """Tokens 0 to 9 are known; a usual batch knows four of its five tokens."""
    train = [batch(*range(10), 40)] * MIN_OCCURRENCES + [batch(50)] * (MIN_OCCURRENCES - 1)
    return Familiarity.fit(60, train, [batch(1, 2, 3, 4, 50), batch(1, 2, 3)])


def test_counts_real_tokens_only(familiarity):
    assert familiarity.known.nonzero()[:, 0].tolist() == [*range(10), 40]
    assert familiarity.usual == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("ids", "trust"), [((1, 2, 3), 1.0), ((1, 2, 3, 4, 59), 1.0), ((1, 58), (0.5 / 0.8) ** STEEPNESS), ((58,), 0)]
)
def test_trust(familiarity, ids, trust):
    assert familiarity.trust(batch(*ids)) == pytest.approx(trust)


def test_unfamiliar_text_is_forecast_from_past_loads_with_more_spread(layout, host, familiarity, tmp_path):
    torch.manual_seed(0)
    table = torch.randn(layout.vocab_size, layout.d_model)
    network = LoadNetwork(layout, Architecture(width=8, depth=1))
    spread = torch.ones(2, layout.num_layers, 3)
    alone, careful = (NeuralForecaster(layout, network, table, spread, known) for known in (None, familiarity))
    history = np.random.default_rng(0).integers(0, 90, (5, layout.num_layers, layout.num_experts))
    known, mixed, unknown = batch(1, 2, 3, 4), batch(1, 2, 58, 57, 56), batch(58, 57)
    assert np.array_equal(careful.forecast(known, history).share, alone.forecast(known, history).share)
    past = careful.forecast(None, history).share
    assert np.allclose(careful.forecast(unknown, history).share, past, atol=1e-6)
    between = careful.forecast(mixed, history)
    tokens = alone.forecast(mixed, history)
    assert (np.abs(between.share - past).sum(-1) < np.abs(tokens.share - past).sum(-1)).all()
    assert between.spread.sum() != tokens.spread.sum()
    assert np.allclose(between.tokens, tokens.tokens, rtol=1e-5)
    save_predictor(tmp_path / "p", careful)
    loaded = load_predictor(tmp_path / "p", layout, table)
    assert np.array_equal(loaded.forecast(mixed, history).share, between.share)
