"""Forecasts of expert load: load a trained predictor, or use a baseline.

    from predictor import load_predictor

    predictor = load_predictor("outputs/predictor")            # a folder, or "owner/name" on the Hugging Face hub
    forecast = predictor.forecast(tokenizer(texts, padding=True, return_tensors="pt"), history=past_loads)
    forecast.load, forecast.spread, forecast.hottest(k=16)

Forecasts and baselines need numpy, a trained predictor needs torch and safetensors as well. What needs Lightning,
scikit-learn or matplotlib is in `predictor.training` and `predictor.evaluation`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .baselines.history import Ema as Ema
    from .baselines.history import LastBatch as LastBatch
    from .checkpoint import load_predictor as load_predictor
    from .forecast import Forecaster as Forecaster
    from .forecast import LoadForecast as LoadForecast

__all__ = ["Ema", "Forecaster", "LastBatch", "LoadForecast", "load_predictor"]
_HOME = {
    "Ema": ".baselines.history",
    "Forecaster": ".forecast",
    "LastBatch": ".baselines.history",
    "LoadForecast": ".forecast",
    "load_predictor": ".checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __package__), name)
