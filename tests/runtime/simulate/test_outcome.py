"""Sums that stand for all steps: quantiles, averages, and intervals of long recordings."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from predictor.baselines.history import RunningMean
from runtime.simulate import verdict
from runtime.simulate.cost_model import Hardware
from runtime.simulate.forecasters import MeanSoFar
from runtime.simulate.outcome import Record, SplitStep
from runtime.simulate.verdict import gain

HARDWARE = Hardware(1e6, tokens_per_second=1e4, bytes_per_second=1e9, expert_overhead_tokens=5)
LOADS = arrays(
    np.int64, st.tuples(st.integers(1, 150), st.integers(1, 3), st.integers(1, 4)), elements=st.integers(0, 9)
)


@settings(max_examples=50, deadline=None)
@given(LOADS)
def test_figures_are_those_of_all_steps(device_load):
    device_load[..., 0] += ~device_load.any((1, 2), keepdims=True)[..., 0]  # every step has some tokens
    layers, devices = device_load.shape[1:]
    record = Record("home", "quota", (layers, 8, 8 * devices, devices), HARDWARE, keep=False)
    for number, load in enumerate(device_load):
        record.add(None, np.full(devices, number), np.zeros(devices, int), number, SplitStep(load, load > 0, 2.0, 0))
    found = record.outcome("last")
    largest = device_load.max(-1)
    balance = np.where(largest > 0, device_load.mean(-1) / np.maximum(largest, 1), np.nan)
    assert found.mean_balancedness == pytest.approx(np.nanmean(balance))
    assert found.p05 == pytest.approx(np.nanquantile(balance, 0.05), abs=1e-5)
    assert found.balance == pytest.approx(np.nanmean(balance, -1))
    assert found.mean_load.sum() / found.largest_load.sum() == pytest.approx(device_load.mean(-1).sum() / largest.sum())
    assert found.seconds == pytest.approx(((device_load + 5 * (device_load > 0)).max(-1) / 1e4).sum(-1))
    assert found.move_seconds == pytest.approx(np.arange(len(device_load)) * 1e-3)
    assert found.arrivals.tolist() == [devices * number for number in range(len(device_load))]
    assert found.num_steps == len(device_load)


@settings(max_examples=30, deadline=None)
@given(arrays(np.int64, st.tuples(st.integers(1, 12), st.just(2), st.integers(1, 5)), elements=st.integers(0, 99)))
def test_the_mean_so_far_is_the_mean_of_the_whole_history(loads):
    forecaster = MeanSoFar()
    for load in loads:
        forecaster.observe(None, load)
    found, expected = (each.forecast(None, loads) for each in (forecaster, RunningMean()))
    assert found.share == pytest.approx(expected.share)
    assert found.tokens == pytest.approx(expected.tokens)
    assert found.spread == pytest.approx(expected.spread, abs=1e-7)


def test_the_interval_of_a_long_recording_is_found_from_sums_of_its_steps(monkeypatch):
    rng = np.random.default_rng(0)
    level = np.repeat(rng.normal(0, 0.05, 64), 64)  # subjects of 64 steps each
    without = rng.uniform(1, 2, 4096)
    net = without * (0.8 + level + rng.normal(0, 0.1, 4096))
    saved, low, high = gain(without, net)
    monkeypatch.setattr(verdict, "MOST_BINS", 4096)
    whole = gain(without, net)
    assert whole[0] == saved
    assert low < saved < high
    assert high - low == pytest.approx(whole[2] - whole[1], rel=0.15)
