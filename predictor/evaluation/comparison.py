"""compare_forecasters: scores the trained predictor and all baselines on the same test batches.

Shape suffixes: N batches, L MoE layers, E logical experts.
"""

import time
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from data.arrays import IntArray
from data.datamodule import RouterTraceModule
from data.traces.dataset import TraceSample, sequence_loads
from data.traces.trace import RouterTrace, TokenBatch
from predictor.baselines.history import Ema, LastBatch, Oracle, Stationary, Uniform
from predictor.baselines.own_past import OwnPast
from predictor.baselines.ridge import RidgeForecaster
from predictor.baselines.token_table import TokenTable
from predictor.evaluation.metrics import likeliest, token_top1
from predictor.evaluation.scores import Scores
from predictor.forecast import Forecaster, LoadForecast, LoadHistory, OnlineForecaster
from predictor.forecaster import NeuralForecaster

BalancednessOf = Callable[[LoadForecast, IntArray, IntArray], float]
"""Balancedness of a batch: its forecast, its load `[L, E]` and the loads before it `[K, L, E]` in; keeps its plan."""

Track = Callable[[Iterable[tuple[int, TraceSample]]], Iterable[tuple[int, TraceSample]]]
"""Iterates over batches and shows the progress."""
Comparison = dict[str, dict[str, Scores]]
"""Stream -> forecaster -> scores."""


def rivals(data: RouterTraceModule) -> list[Forecaster]:
    """The baselines, fitted on training batches (the rate of `Ema` on validation batches), and the oracle.

    Requests' own past is among them if the trace says which request a sequence belongs to.
    """
    layout, loads = data.layout, data.loads
    steps = {split: [step for step, name in enumerate(data.splits) if name == split] for split in ("train", "val")}
    ema = Ema.fit(loads, steps["val"])
    with_requests = next(iter(data.samples("test"))).trace.requests is not None
    return [
        Uniform(layout.num_layers, layout.num_experts),
        Stationary(loads[steps["train"]].mean(0)),
        LastBatch(),
        ema,
        *([OwnPast(layout.experts_per_token, ema)] if with_requests else []),
        RidgeForecaster(loads, steps["train"]),
        TokenTable(layout, (sample.trace for sample in data.samples("train")), ema),
        Oracle(loads),
    ]


def compare_forecasters(
    forecasters: list[Forecaster],
    data: RouterTraceModule,
    new_balancers: Mapping[int, Callable[[], BalancednessOf]] | None = None,
    track: Track = iter,
) -> Comparison:
    """Scores forecasters on all test batches.

    Args:
        forecasters: The forecasters; regrets need the oracle among them.
        data: The trace, set up.
        new_balancers: Number of redundant experts -> function that makes the `BalancednessOf` of one forecaster on
            one stream.
        track: Iterates over the test batches and shows the progress.
    """
    comparison: Comparison = {}
    balancers: dict[tuple[str, str, int], BalancednessOf] = {}
    for step, sample in track(test_steps(data)):
        stream = comparison.setdefault(sample.trace.phase, {})
        for forecaster in forecasters:
            scores = stream.setdefault(forecaster.name, Scores())
            started = time.perf_counter()
            forecast, logits = forecast_and_logits(forecaster, sample.trace.upcoming, data.loads[:step])
            scores.milliseconds.append(1e3 * (time.perf_counter() - started))
            scores.add(forecast, data.loads[step], data.layout.experts_per_token)
            if isinstance(forecaster, OnlineForecaster):
                sequences = sequence_loads(sample.trace, data.layout).numpy()
                forecaster.observe(sample.trace.upcoming, data.loads[step], sequences)
            if (chosen := chosen_experts(forecaster, sample.trace, logits)) is not None:
                scores.token_top1.append(token_top1(chosen, sample.trace.experts).double().numpy())
            for count, new in (new_balancers or {}).items():
                key = (sample.trace.phase, forecaster.name, count)
                balancer = balancers.get(key) or balancers.setdefault(key, new())
                value = balancer(forecast, data.loads[step], data.loads[:step])
                scores.balancedness.setdefault(count, []).append(value)
    _add_regrets(comparison)
    return comparison


def _add_regrets(comparison: Comparison) -> None:
    for stream in comparison.values():
        best = stream[Oracle.name].balancedness if Oracle.name in stream else {}
        for scores in stream.values():
            scores.regret = {
                count: [most - own for most, own in zip(values, scores.balancedness[count], strict=True)]
                for count, values in best.items()
            }


def test_steps(data: RouterTraceModule) -> Iterable[tuple[int, TraceSample]]:
    """Each test batch with its number in the trace; batch 0 is left out because it has no past."""
    steps = [step for step, split in enumerate(data.splits) if split == "test"]
    return ((step, sample) for step, sample in zip(steps, data.samples("test"), strict=True) if step > 0)


def forecast_and_logits(
    forecaster: Forecaster, upcoming: TokenBatch, history: LoadHistory
) -> tuple[LoadForecast, Tensor | None]:
    """The forecast, and the logits `[B, T, L_in, E]` of a network, so that it runs once for both."""
    if isinstance(forecaster, NeuralForecaster):
        return forecaster.forecast_and_logits(upcoming, history)
    return forecaster.forecast(upcoming, history), None


def chosen_experts(forecaster: Forecaster, trace: RouterTrace, logits: Tensor | None) -> Tensor | None:
    """The K experts predicted for each token, `[L_in, B, T, K]`; None if the forecaster predicts loads only."""
    if isinstance(forecaster, Oracle):
        return trace.experts
    if isinstance(forecaster, TokenTable):
        return forecaster.route(trace.upcoming)
    return None if logits is None else likeliest(logits, trace.experts.shape[-1])
