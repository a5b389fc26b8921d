"""Baselines: simple forecasters that a trained predictor has to beat.

`history` holds those of past loads alone (numpy only, exported here); `token_table` looks tokens up in a table (torch);
`ridge` is a linear regression (scikit-learn).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .history import Ema as Ema
    from .history import LastBatch as LastBatch
    from .history import Oracle as Oracle
    from .history import RunningMean as RunningMean

__all__ = ["Ema", "LastBatch", "Oracle", "RunningMean"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".history", __package__), name)
