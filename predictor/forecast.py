"""LoadForecast: the predicted load of every expert in the coming batch, and Forecaster, the protocol that makes one.

A forecaster of your own needs a `name` and a method `forecast(upcoming, history)`; `forecast_from_load` turns the
loads that it predicts into a `LoadForecast`. No torch is needed.

Shape suffixes: B sequences, F features, K past batches, L MoE layers, E logical experts.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from data.arrays import Float32Array, FloatArray
from data.traces.loads import share_of

if TYPE_CHECKING:  # it imports torch
    from data.traces.trace import TokenBatch

LoadHistory = npt.NDArray[np.int64]
"""Loads of the batches that have run, oldest first, int64 `[K, L, E]`; K may be 0."""

Loads = npt.NDArray[Any]
"""Loads of sequences, whole numbers `[B, L, E]` of any type."""


@dataclass(frozen=True)
class LoadForecast:
    """The predicted load `[L, E]` of a batch that has not run yet.

    Attributes:
        share: Predicted load divided by its sum over experts, `[L, E]`; every row sums to 1.
        tokens: Predicted dispatched tokens of each layer, `[L]`.
        spread: One standard deviation of each share, `[L, E]`; zeros if the forecaster does not estimate it.
        made_at: Number of batches that had run when the forecast was made.
        source: Name of the forecaster.

    Raises:
        ValueError: On shapes that disagree, NaN, infinite or negative numbers, or rows that do not sum to 1.

    Example:
        >>> share = np.array([[0.5, 0.25, 0.25], [0.0, 0.125, 0.875]])
        >>> forecast = LoadForecast(share, np.array([8.0, 16.0]), np.zeros((2, 3)), made_at=0, source="example")
        >>> forecast.load.tolist()
        [[4.0, 2.0, 2.0], [0.0, 2.0, 14.0]]
        >>> forecast.hottest(k=2)
        [(1, 2, 14.0), (0, 0, 4.0)]
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

    def hottest(self, k: int = 16) -> list[tuple[int, int, float]]:
        """The `k` experts of all layers with the most predicted tokens: (layer, expert, tokens), most tokens first."""
        load = self.load
        layers, experts = np.unravel_index(np.argsort(-load, axis=None, kind="stable")[:k], load.shape)
        return list(zip(layers.tolist(), experts.tolist(), load[layers, experts].tolist(), strict=True))


class SequenceForecast(NamedTuple):
    """What a forecaster expects of each sequence of a batch.

    Attributes:
        load: Expected assignments of each sequence, `[B, L, E]`.
        features: Numbers that tell sequences apart, `[B, F]`, from which errors of the loads can be learned; F may be
            0.
    """

    load: Float32Array
    features: Float32Array


class NoHistoryError(ValueError):
    """A forecaster that uses past loads alone was asked before any batch had run."""


class Forecaster(Protocol):
    """Forecasts the coming batch's load: the trained network and the baselines alike."""

    @property
    def name(self) -> str:
        """Name in tables, and `source` of its forecasts."""
        ...

    def forecast(self, upcoming: "TokenBatch | None", history: LoadHistory) -> LoadForecast:
        """Forecasts the load of the coming batch.

        Args:
            upcoming: The coming batch's tokens, or None if they are not known.
            history: Loads of the batches that have run, oldest first, `[K, L, E]`.
        """
        ...


@runtime_checkable
class OnlineForecaster(Forecaster, Protocol):
    """A forecaster that learns from every batch that has run."""

    def observe(self, upcoming: "TokenBatch | None", load: LoadHistory, sequences: Loads | None = None) -> None:
        """Learns from a batch that has run; called once for each batch, in their order.

        Args:
            upcoming: What `forecast` was given for this batch. A batch that was not forecast may be observed as well.
            load: Its load, `[L, E]`.
            sequences: Loads of its sequences, `[B, L, E]`; None if only the batch's is known.
        """
        ...


def forecast_from_load(
    load: FloatArray, *, made_at: int, source: str, spread: FloatArray | None = None
) -> LoadForecast:
    """Turns a predicted load `[L, E]` in tokens into a forecast; the shares of a layer without load are uniform."""
    share = share_of(load)
    return LoadForecast(share, load.sum(-1), np.zeros_like(share) if spread is None else spread, made_at, source)
