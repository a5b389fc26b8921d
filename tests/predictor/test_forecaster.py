"""What `NeuralForecaster.forecast` accepts and refuses, and what baselines say without a history."""

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from predictor.baselines.history import Ema, LastBatch, RunningMean
from predictor.forecaster import NeuralForecaster
from predictor.network import Architecture, LoadNetwork
from tests.helpers.made_up_trace import EXPERTS, VOCABULARY


@pytest.fixture
def learned(layout) -> NeuralForecaster:
    torch.manual_seed(0)
    network = LoadNetwork(layout, Architecture(width=8, history=True))
    return NeuralForecaster(layout, network, torch.randn(VOCABULARY, layout.d_model), torch.ones(2, 3, 3))


def same(ours, theirs) -> bool:
    return np.array_equal(ours.share, theirs.share) and ours.made_at == theirs.made_at


def test_a_tokenizer_output_forecasts_as_its_token_batch(learned, upcoming):
    encoding = {"input_ids": upcoming.input_ids.tolist(), "attention_mask": upcoming.mask.long().tolist()}
    expected = learned.forecast(upcoming)
    assert same(learned.forecast(encoding), expected)
    assert same(learned.forecast(BatchEncoding(encoding, tensor_type="pt")), expected)
    assert same(learned.forecast(BatchEncoding(encoding, tensor_type="np")), expected)


def test_history_may_be_array_tensor_or_list(learned, upcoming):
    past = np.random.default_rng(0).integers(0, 90, (70, 3, EXPERTS))
    expected = learned.forecast(upcoming, past)
    assert expected.made_at == 70
    for history in (
        torch.from_numpy(past),
        past.astype(np.float64),
        list(past),
        list(torch.from_numpy(past)),
        past.tolist(),
    ):
        assert same(learned.forecast(upcoming, history), expected)


def test_no_history_has_several_forms(learned, upcoming):
    expected = learned.forecast(upcoming, np.zeros((0, 3, EXPERTS), dtype=int))
    for history in (None, [], torch.zeros(0, 3, EXPERTS)):
        assert same(learned.forecast(upcoming, history), expected)
    assert learned.forecast(None).tokens.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("history", "got"),
    [
        (np.ones((4, 2, EXPERTS)), r"got shape \[4, 2, 8\]"),
        (torch.ones(3, EXPERTS), r"got shape \[3, 8\]"),
        ([np.ones((3, 4))], r"got shape \[1, 3, 4\]"),
        ([np.ones((3, EXPERTS)), np.ones((3, 4))], "got no array of loads"),
        (["a"], "got no array of loads"),
    ],
)
def test_a_history_of_another_model_is_refused(learned, upcoming, history, got):
    with pytest.raises(ValueError, match=rf"history: expected \[K, L, E\] = \[K, 3, 8\], .*{got}"):
        learned.forecast(upcoming, history)


def test_what_is_no_batch_is_refused(learned):
    with pytest.raises(ValueError, match="tokenize with padding=True"):
        learned.forecast({"input_ids": [[1, 2], [3]]})
    with pytest.raises(TypeError, match="got a str, expected what a tokenizer returns"):
        learned.forecast("a text")
    for wrong in (VOCABULARY, -1):
        with pytest.raises(ValueError, match=f"token id {wrong} has no row in the table of 60 embeddings"):
            learned.forecast({"input_ids": [[1, wrong]]})


@pytest.mark.parametrize("baseline", [LastBatch(), RunningMean(), Ema()])
@pytest.mark.parametrize("history", [None, np.zeros((0, 3, EXPERTS), dtype=int)])
def test_baselines_ask_for_a_past_batch(baseline, history):
    with pytest.raises(ValueError, match=f"'{baseline.name}' needs the load of at least one past batch, got none"):
        baseline.forecast(None, history)
