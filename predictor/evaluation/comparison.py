"""The ladder: every forecaster on the same test batches, through the same metrics, one table.

Shape suffixes: N batches, L MoE layers, E logical experts.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from data.arrays import FloatArray, IntArray
from data.datamodule import RouterTraceModule
from data.traces.dataset import TraceSample
from predictor.baselines.history import Ema, LastBatch, Oracle, Stationary, Uniform
from predictor.baselines.ridge import RidgeForecaster
from predictor.baselines.token_table import TokenTable
from predictor.evaluation.metrics import token_top1
from predictor.evaluation.scores import Scores
from predictor.forecast import Forecaster, LoadForecast

Balancer = Callable[[LoadForecast, IntArray, IntArray], float]
"""Balancedness that a forecast, the load that came `[L, E]` and those before it `[K, L, E]` lead to; keeps its plan."""
REGRETS = {"balancedness": "regret", "balancedness_8": "regret_8"}
"""Each balancedness of `Scores`, and where its distance to the oracle's goes."""

Track = Callable[[Iterable[tuple[int, TraceSample]]], Iterable[tuple[int, TraceSample]]]

Ladder = dict[str, dict[str, Scores]]
"""Stream, then forecaster."""


def rivals(data: RouterTraceModule) -> list[Forecaster]:
    """The baselines, fitted on training batches (the moving average's rate on validation batches), and the oracle."""
    layout, loads = data.layout, data.loads
    steps = {split: [step for step, name in enumerate(data.splits) if name == split] for split in ("train", "val")}
    ema = Ema.fit(loads, steps["val"])
    return [
        Uniform(layout.num_layers, layout.num_experts),
        Stationary(loads[steps["train"]].mean(0)),
        LastBatch(),
        ema,
        RidgeForecaster(loads, steps["train"]),
        TokenTable(layout, (sample.trace for sample in data.samples("train")), ema),
        Oracle(loads),
    ]


def compare_forecasters(
    forecasters: list[Forecaster],
    data: RouterTraceModule,
    new_balancers: Mapping[str, Callable[[], Balancer]] | None = None,
    track: Track = iter,
) -> Ladder:
    """Scores forecasters on all test batches.

    Args:
        forecasters: What to score.
        data: A module that was set up.
        new_balancers: For each balancedness of `Scores` what makes the balancer of one forecaster on one stream.
        track: Iterates over the test batches and shows the progress.
    """
    ladder: Ladder = {}
    balancers: dict[tuple[str, str, str], Balancer] = {}
    for step, sample in track(test_steps(data)):
        stream = ladder.setdefault(sample.trace.phase, {})
        for forecaster in forecasters:
            scores = stream.setdefault(forecaster.name, Scores())
            started = time.perf_counter()
            forecast = forecaster.forecast(sample.trace.tokens, data.loads[:step])
            scores.milliseconds.append(1e3 * (time.perf_counter() - started))
            scores.add(forecast, data.loads[step])
            if (right := _top1(forecaster, sample)) is not None:
                scores.token_top1.append(right)
            for metric, new in (new_balancers or {}).items():
                key = (sample.trace.phase, forecaster.name, metric)
                balancer = balancers.get(key) or balancers.setdefault(key, new())
                getattr(scores, metric).append(balancer(forecast, data.loads[step], data.loads[:step]))
    _add_regrets(ladder)
    return ladder


def _add_regrets(ladder: Ladder) -> None:
    for stream in ladder.values():
        for metric, regret in REGRETS.items():
            best = getattr(stream[Oracle.name], metric) if Oracle.name in stream else []
            for scores in stream.values():
                own = getattr(scores, metric)
                getattr(scores, regret).extend(most - got for most, got in zip(best, own, strict=False))


def test_steps(data: RouterTraceModule) -> Iterable[tuple[int, TraceSample]]:
    """Each test batch with its place in the trace; the first batch of all has no past and is left out."""
    steps = [step for step, split in enumerate(data.splits) if split == "test"]
    return ((step, sample) for step, sample in zip(steps, data.samples("test"), strict=True) if step > 0)


def _top1(forecaster: Any, sample: TraceSample) -> FloatArray | None:
    """Right tokens of each encoder layer, or None for a forecaster of loads alone; the oracle knows them all."""
    experts = sample.trace.encoder_experts
    if isinstance(forecaster, Oracle):
        return token_top1(experts, experts).double().numpy()
    if not hasattr(forecaster, "route"):
        return None
    return token_top1(forecaster.route(sample.trace.tokens), experts).double().numpy()
