"""Calibration of the forecast's uncertainty: fits the spread to the errors on validation batches.

The squared error of a load is modelled as a weighted sum of three sources (`predictor.forecaster.Estimate`): chance, a
bias that grows with the load, and the difference to the forecast from past loads. The ratios of the weights maximise
the likelihood; their scale is then set so that 80 % intervals cover 80 % of the true loads.
Shape suffixes: N batches, S the three sources of error, L MoE layers, E logical experts.
"""

from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor

from data.traces.dataset import TraceSample
from predictor.evaluation.metrics import shares
from predictor.forecaster import NeuralForecaster

Z80 = 1.2816
"""Half-width, in standard deviations, of the interval that contains 80 % of a normal distribution."""
RATIOS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Candidate weights of the second and the third source; the weight of the first source is 1."""


def fit_spread(load_NLE: Tensor, terms_NSLE: Tensor, truth_NLE: Tensor) -> Tensor:
    """Weights of the three sources in each layer, `[L, S]`; 1 for a layer without load."""
    result = torch.ones(load_NLE.shape[1], 3)
    for layer in range(len(result)):
        carried = truth_NLE[:, layer].sum(-1) > 0
        if not carried.any():
            continue
        load, truth, terms = load_NLE[carried, layer], truth_NLE[carried, layer], terms_NSLE[carried, :, layer]
        error = (shares(load) - shares(truth)).abs() * load.sum(-1, keepdim=True).clamp(min=1e-9)
        best = torch.inf
        for ratios in product(RATIOS, RATIOS):
            weights = torch.tensor([1.0, *ratios])
            unit = torch.einsum("s,nse->ne", weights, terms).clamp(min=1e-6).sqrt()
            scale = (error / unit).flatten().quantile(0.8).clamp(min=1e-3) / Z80
            surprise = float(((error / (scale * unit)) ** 2 / 2 + (scale * unit).log()).mean())
            if surprise < best:
                best, result[layer] = surprise, scale**2 * weights
    return result


def calibrate_spread(forecaster: NeuralForecaster, samples: Iterable[TraceSample]) -> Tensor:
    """Weights of the sources, `[2, L, S]`: for forecasts from tokens and history, then from history alone."""
    known, unknown, truth = [], [], []
    for sample in samples:
        known.append(forecaster.estimate(sample.trace.upcoming, sample.history))
        unknown.append(forecaster.estimate(None, sample.history))
        truth.append(sample.load)
    loads = torch.stack(truth)
    return torch.stack(
        [
            fit_spread(torch.stack([one.load for one in part]), torch.stack([one.terms for one in part]), loads)
            for part in (known, unknown)
        ]
    )
