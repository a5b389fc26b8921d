"""Load errors on the validation batches: of a finished predictor beside forecasters that need no training."""

import math
from collections.abc import Iterable, Sequence

import torch

from data.models.layout import MoELayout
from data.traces.dataset import TraceSample, sequence_loads
from predictor.evaluation.metrics import load_tv
from predictor.forecast import Forecaster, OnlineForecaster


def load_errors(
    forecasters: Sequence[Forecaster], samples: Iterable[TraceSample], layout: MoELayout
) -> dict[str, float]:
    """Mean `load_tv` of each forecaster over batches, then over layers.

    Forecasters that learn while they serve do so: afterwards they know these batches. A batch without any before it is
    left out; where no batch with load remains, so is the forecaster.

    Args:
        forecasters: The forecasters; their names must differ.
        samples: The batches, in their order.
        layout: Layout of the model.
    """
    errors: dict[str, list[torch.Tensor]] = {forecaster.name: [] for forecaster in forecasters}
    for sample in samples:
        if not len(sample.history):
            continue
        upcoming, load, history = sample.trace.upcoming, sample.load, sample.history.long().numpy()
        for forecaster in forecasters:
            forecast = forecaster.forecast(upcoming, history)
            errors[forecaster.name].append(load_tv(torch.from_numpy(forecast.load).float(), load))
            if isinstance(forecaster, OnlineForecaster):
                sequences = sequence_loads(sample.trace, layout).numpy()
                forecaster.observe(upcoming, load.long().numpy(), sequences)
    means = {name: float(torch.stack(found).nanmean(0).nanmean()) for name, found in errors.items() if found}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}
