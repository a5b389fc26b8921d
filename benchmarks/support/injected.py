"""Routing to inject into a layer: recorded or Zipf loads, and tokens that are routed to match them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.arrays import IntArray
from data.traces.loads import read_loads
from predictor.forecast import forecast_from_load


class Stream:
    """Loads of one layer, step by step, with one routed token for each unit of load.

    Args:
        loads: Tokens of each expert, `[steps, E]`.
        ranks: Number of ranks; tokens are assigned to them at random.
    """

    def __init__(self, loads: IntArray, ranks: int) -> None:
        self.loads, self.ranks = loads, ranks

    def routed(self, step: int, rank: int, uniform: bool, devices: int) -> torch.Tensor:
        """One-hot experts `[T / ranks, 1, E]` of a rank's tokens; `uniform` spreads each expert's tokens evenly."""
        size = self.loads.shape[1]
        expert = np.repeat(np.arange(size), self.loads[step])
        if uniform:
            expert = (expert + np.arange(len(expert)) % devices * (size // devices)) % size
        mine = np.random.default_rng(step).permutation(expert)[rank :: self.ranks]
        return torch.nn.functional.one_hot(torch.from_numpy(mine), size)[:, None]


def zipf(experts: int, tokens: int, steps: int, exponent: float) -> IntArray:
    """Loads of a steady stream: expert i has a share proportional to 1 / i^exponent; tokens are drawn."""
    share = np.arange(1.0, experts + 1) ** -exponent
    return np.random.default_rng(0).multinomial(tokens, share / share.sum(), size=steps)


def recorded(path: Path, layer: int, tokens: int, steps: int) -> IntArray:
    """A layer's recorded loads, resampled to `tokens` tokens a step."""
    loads = read_loads(path).loads
    if not 0 <= layer < loads.shape[1]:
        raise ValueError(f"layer is {layer}; {path} has layers 0 to {loads.shape[1] - 1}")
    rows = loads[:steps, layer].astype(np.float64)
    rng = np.random.default_rng(0)
    return np.stack([rng.multinomial(tokens, row / row.sum()) for row in rows if row.sum()])


class Upcoming:
    """The oracle as a forecaster; `load` must be set to the next step's load."""

    name = "oracle"

    def __init__(self) -> None:
        self.load: IntArray | None = None

    def forecast(self, upcoming: object, history: IntArray) -> Any:
        assert self.load is not None
        return forecast_from_load(self.load[None].astype(np.float64), made_at=len(history), source=self.name)
