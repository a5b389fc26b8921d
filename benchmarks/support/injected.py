"""Routing to inject: loads, recorded or Zipf, and tokens that go where they say."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.arrays import IntArray
from data.traces.loads import read_loads
from predictor.forecast import forecast_from_load


class Stream:
    """Loads of one layer, step by step, and the tokens they stand for.

    Args:
        loads: Tokens of each expert, `[steps, E]`.
        ranks: Ranks the tokens are spread over at random.
    """

    def __init__(self, loads: IntArray, ranks: int) -> None:
        self.loads, self.ranks = loads, ranks

    def routed(self, step: int, rank: int, uniform: bool, devices: int) -> torch.Tensor:
        """One-hot choices `[T / ranks, 1, E]` of a rank's tokens; `uniform` spreads each expert's over all devices."""
        size = self.loads.shape[1]
        expert = np.repeat(np.arange(size), self.loads[step])
        if uniform:
            expert = (expert + np.arange(len(expert)) % devices * (size // devices)) % size
        mine = np.random.default_rng(step).permutation(expert)[rank :: self.ranks]
        return torch.nn.functional.one_hot(torch.from_numpy(mine), size)[:, None]


def zipf(experts: int, tokens: int, steps: int, exponent: float) -> IntArray:
    """A steady stream: the i-th expert's share falls as i to the `exponent`, and tokens are drawn from the shares."""
    share = np.arange(1.0, experts + 1) ** -exponent
    return np.random.default_rng(0).multinomial(tokens, share / share.sum(), size=steps)


def recorded(path: Path, layer: int, tokens: int, steps: int) -> IntArray:
    """A layer's recorded loads, drawn anew so that each step has `tokens`."""
    loads = read_loads(path).loads
    if not 0 <= layer < loads.shape[1]:
        raise ValueError(f"layer is {layer}; {path} has layers 0 to {loads.shape[1] - 1}")
    rows = loads[:steps, layer].astype(np.float64)
    rng = np.random.default_rng(0)
    return np.stack([rng.multinomial(tokens, row / row.sum()) for row in rows if row.sum()])


class Upcoming:
    """The oracle as a forecaster: it is told the next load."""

    name = "oracle"

    def __init__(self) -> None:
        self.load: IntArray | None = None

    def forecast(self, upcoming: object, history: IntArray) -> Any:
        """See `predictor.forecast.Forecaster`."""
        assert self.load is not None
        return forecast_from_load(self.load[None].astype(np.float64), made_at=len(history), source=self.name)
