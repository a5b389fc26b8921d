"""segment_errors: forecast errors per segment of the text (topic, language), seen in training or not.

The sequences of one segment in a test batch are forecast as a batch of their own, in the input layers. A trained
predictor gets their tokens only, because past loads are of whole batches, not of one segment.
"""

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from data.datamodule import RouterTraceModule
from data.traces.dataset import part, sequence_loads
from predictor.baselines.token_table import TokenTable
from predictor.evaluation.comparison import Track, chosen_experts, forecast_and_logits, test_steps
from predictor.evaluation.metrics import load_tv, token_top1
from predictor.evaluation.scores import Scores
from predictor.forecaster import NeuralForecaster

MIN_SEQUENCES = 4
"""Fewest sequences of a segment in a batch that are scored."""


def segment_errors(
    forecasters: list[NeuralForecaster | TokenTable], data: RouterTraceModule, track: Track = iter
) -> dict[str, Any]:
    """Segment -> whether it was in the training batches (`seen`), and each forecaster's metrics with intervals."""
    layout, split = data.layout, data.layout.num_input_layers
    scores: dict[str, dict[str, Scores]] = defaultdict(lambda: defaultdict(Scores))
    for step, sample in track(test_steps(data)):
        names = np.array(sample.trace.segments)
        for segment in np.unique(names):
            rows = torch.from_numpy(np.flatnonzero(names == segment))
            if len(rows) < MIN_SEQUENCES:
                continue
            piece = part(sample.trace, rows)
            truth = sequence_loads(piece, layout)[:, :split].sum(0).float()
            for forecaster in forecasters:
                past = data.loads[:0] if isinstance(forecaster, NeuralForecaster) else data.loads[:step]
                forecast, logits = forecast_and_logits(forecaster, piece.upcoming, past)
                load = torch.from_numpy(forecast.load[:split]).float()
                its = scores[str(segment)][forecaster.name]
                its.load_tv.append(load_tv(load, truth).numpy())
                chosen = chosen_experts(forecaster, piece, logits)
                if chosen is not None:
                    its.token_top1.append(token_top1(chosen, piece.experts).double().numpy())
    seen = {segment for sample in data.samples("train") for segment in sample.trace.segments}
    return {
        segment: {"seen": segment in seen} | {name: _figures(its) for name, its in forecast.items()}
        for segment, forecast in sorted(scores.items(), key=lambda pair: (pair[0] not in seen, pair[0]))
    }


def _figures(scores: Scores) -> dict[str, Any]:
    result: dict[str, Any] = {"batches": len(scores.load_tv)}
    for metric in ("load_tv", "token_top1"):
        low, high = scores.interval(metric)
        result[metric] = round(float(np.mean(getattr(scores, metric))), 4)
        result[f"{metric}_interval"] = [round(low, 4), round(high, 4)]
    return result
