"""Routing to inject into a layer: recorded or Zipf loads, and tokens that are routed to match them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.arrays import IntArray
from data.traces.loads import read_loads
from predictor.forecast import forecast_from_load


class Stream:
    """Routes of one layer, step by step.

    With one expert a token, the tokens of each expert are the given loads exactly. With several, each token draws K
    different experts by the step's shares (Gumbel top-k), and the loads count what was drawn.

    Args:
        loads: Assignments to each expert, `[steps, E]`.
        ranks: Number of ranks; tokens are assigned to them at random.
        top_k: Experts of a token, K.

    Attributes:
        loads: Assignments to each expert as routed, `[steps, E]`.
    """

    def __init__(self, loads: IntArray, ranks: int, top_k: int = 1) -> None:
        self.ranks, self.top_k, size = ranks, top_k, loads.shape[1]
        if top_k == 1:
            self._routes = [np.repeat(np.arange(size), load)[:, None] for load in loads]
        else:
            self._routes = [drawn(load, top_k, np.random.default_rng((1, step))) for step, load in enumerate(loads)]
        self.loads = np.stack([np.bincount(routes.ravel(), minlength=size) for routes in self._routes])

    def routed(self, step: int, rank: int, uniform: bool, devices: int) -> torch.Tensor:
        """Experts of a rank's tokens: one-hot `[T / ranks, 1, E]` for one a token, else numbers `[T / ranks, K]`.

        `uniform` spreads each expert's tokens evenly.
        """
        size, routes_TK = self.loads.shape[1], self._routes[step]
        if uniform:
            routes_TK = (routes_TK + (np.arange(len(routes_TK)) % devices * (size // devices))[:, None]) % size
        mine = torch.from_numpy(np.random.default_rng(step).permutation(routes_TK)[rank :: self.ranks])
        return torch.nn.functional.one_hot(mine[:, 0], size)[:, None] if self.top_k == 1 else mine


def drawn(load: IntArray, top_k: int, rng: np.random.Generator) -> IntArray:
    """K different experts for each of the tokens that have as many assignments as a load, `[T, K]`."""
    chance = np.log(np.maximum(load / load.sum(), 1e-9))
    keys = chance + rng.gumbel(size=(int(load.sum()) // top_k, len(load)))
    return np.asarray(np.argpartition(-keys, top_k - 1, axis=1)[:, :top_k])


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
