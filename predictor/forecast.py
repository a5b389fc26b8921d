"""The word between predictor and runtime: a forecast of the load a batch will put on each expert.

Shape suffixes: K past batches, L MoE layers, E logical experts.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from data.arrays import FloatArray
from data.traces.loads import share_of

if TYPE_CHECKING:  # forecasts need no torch
    from data.traces.trace import TokenBatch

LoadHistory = npt.NDArray[np.int64]
"""Loads of the batches that have run, oldest first, int64 `[K, L, E]`; K may be 0."""


@dataclass(frozen=True)
class LoadForecast:
    """A predicted load `[L, E]` for a batch that has not run yet.

    Attributes:
        share: Predicted load divided by its sum, `[L, E]`; every row sums to 1.
        tokens: Predicted dispatched tokens in each layer, `[L]`.
        spread: One standard deviation of each share, `[L, E]`; zeros where the forecaster does not know.
        made_at: Number of batches that had run when the forecast was made.
        source: Name of the forecaster.

    Raises:
        ValueError: On shapes that disagree, NaN, infinite or negative numbers, or rows that do not sum to 1.
    """

    share: FloatArray
    tokens: FloatArray
    spread: FloatArray
    made_at: int
    source: str

    def __post_init__(self) -> None:
        if self.share.ndim != 2:
            raise ValueError(f"forecast '{self.source}': share has shape {self.share.shape}, expected [L, E]")
        if self.tokens.shape != self.share.shape[:1]:
            raise ValueError(
                f"forecast '{self.source}': tokens has shape {self.tokens.shape}, expected {self.share.shape[:1]}"
            )
        if self.spread.shape != self.share.shape:
            raise ValueError(
                f"forecast '{self.source}': spread has shape {self.spread.shape}, expected {self.share.shape}"
            )
        for name in ("share", "tokens", "spread"):
            value = getattr(self, name)
            if not np.isfinite(value).all() or (value < 0).any():
                raise ValueError(f"forecast '{self.source}': {name} has NaN, infinite or negative entries")
        if not np.allclose(self.share.sum(-1), 1.0, atol=1e-4):
            raise ValueError(f"forecast '{self.source}': shares of a layer must sum to 1, got {self.share.sum(-1)}")

    @property
    def load(self) -> FloatArray:
        """Predicted dispatched tokens of each expert, `[L, E]`."""
        return self.share * self.tokens[:, None]


class Forecaster(Protocol):
    """Anything that forecasts the coming batch's load; networks and baselines alike."""

    @property
    def name(self) -> str:
        """What tables and forecasts call it."""
        ...

    def forecast(self, upcoming: "TokenBatch | None", history: LoadHistory) -> LoadForecast:
        """Forecasts the load of the coming batch.

        Args:
            upcoming: The coming batch's own tokens, or None when the queue is empty.
            history: Loads of the batches that have run, oldest first, `[K, L, E]`.
        """
        ...


def forecast_from_load(
    load: FloatArray, *, made_at: int, source: str, spread: FloatArray | None = None
) -> LoadForecast:
    """Turns a predicted load `[L, E]` in tokens into a forecast; a layer with no load becomes uniform."""
    share = share_of(load)
    return LoadForecast(share, load.sum(-1), np.zeros_like(share) if spread is None else spread, made_at, source)
