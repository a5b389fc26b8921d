"""How far a forecast may be off: fits the spread to what the errors were on validation batches.

The squared error of a share is taken as `a * variance + b * share^2`: chance in the tokens' choices, and a bias of the
network that grows with the load. b / a is picked by likelihood; a then makes 80 % intervals cover 80 %.
Shape suffixes: N batches, L MoE layers, E logical experts.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from data.samples import TraceSample
from predictor.learned import LearnedForecaster
from predictor.metrics import shares

Z80 = 1.2816
"""Standard deviations to either side of the mean that hold 80 % of a normal distribution."""
RATIOS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def fit_spread(load_NLE: Tensor, variance_NLE: Tensor, truth_NLE: Tensor) -> Tensor:
    """Coefficients (a, b) of each layer, `[L, 2]`; ones where a layer carried no load."""
    result = torch.ones(load_NLE.shape[1], 2)
    for layer in range(len(result)):
        carried = truth_NLE[:, layer].sum(-1) > 0
        if not carried.any():
            continue
        load, truth = load_NLE[carried, layer], truth_NLE[carried, layer]
        tokens = load.sum(-1, keepdim=True).clamp(min=1e-9)
        error = (shares(load) - shares(truth)).abs()
        best = torch.inf
        for ratio in RATIOS:
            unit = (variance_NLE[carried, layer] + ratio * load**2).clamp(min=1e-6).sqrt() / tokens
            scale = (error / unit).flatten().quantile(0.8).clamp(min=1e-3) / Z80
            surprise = float(((error / (scale * unit)) ** 2 / 2 + (scale * unit).log()).mean())
            if surprise < best:
                best, result[layer] = surprise, torch.stack([scale**2, ratio * scale**2])
    return result


def calibrate_spread(forecaster: LearnedForecaster, samples: Iterable[TraceSample]) -> Tensor:
    """Spread coefficients with tokens known and with history alone, `[2, L, 2]`."""
    known, unknown, truth = [], [], []
    for sample in samples:
        prediction = forecaster.predict(sample.trace.tokens, sample.history)
        known.append(torch.stack([prediction.load, prediction.variance]))
        unknown.append(torch.stack(forecaster.from_history(sample.history)))
        truth.append(sample.load)
    loads = torch.stack(truth)
    pairs = [torch.stack(pair).unbind(1) for pair in (known, unknown)]
    return torch.stack([fit_spread(load, variance, loads) for load, variance in pairs])
