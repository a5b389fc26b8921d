"""LoadForecast, the public names of the package, and the examples in its docstrings."""

import doctest
import sys

import numpy as np
import pytest

import predictor
from predictor import LoadForecast
from predictor.forecast import forecast_from_load
from tests.predictor.conftest import ROOT


def test_hottest_are_sorted_and_stable():
    load = np.array([[1.0, 7.0, 0.0], [7.0, 2.0, 9.0]])
    forecast = forecast_from_load(load, made_at=0, source="test")
    assert forecast.hottest(k=3) == [(1, 2, 9.0), (0, 1, 7.0), (1, 0, 7.0)]
    assert len(forecast.hottest()) == 6


def test_shares_must_sum_to_one():
    share = np.full((1, 2), 0.4)
    with pytest.raises(ValueError, match="forecast 'x': shares of a layer must sum to 1"):
        LoadForecast(share, np.ones(1), np.zeros((1, 2)), 0, "x")


def test_public_names():
    assert set(predictor.__all__) == {"Ema", "Forecaster", "LastBatch", "LoadForecast", "load_predictor"}
    for name in predictor.__all__:
        assert getattr(predictor, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'predictor' has no attribute 'nothing'"):
        _ = predictor.nothing


@pytest.mark.parametrize("module", ["predictor.forecast", "predictor.checkpoint"])
def test_examples_in_docstrings(module, monkeypatch):
    monkeypatch.chdir(ROOT)
    __import__(module)
    failed, attempted = doctest.testmod(sys.modules[module])
    assert attempted
    assert not failed
