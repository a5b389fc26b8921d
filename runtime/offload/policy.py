"""Policy: decides which experts a cache evicts and prefetches, from when each expert is expected to be used next.

An expert's *next use* is the number of MoE layers that will run until the expert is expected to be needed again; the
layer that runs next has distance 1. The cache evicts the expert with the largest next use (Belady's rule on predicted
distances) and prefetches the policy's candidates. Policies therefore differ only in what they predict. An example with
numbers is in docs/tiers.md.

Shape suffixes: L MoE layers, E logical experts.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from data.arrays import BoolArray, FloatArray
from predictor.forecast import LoadForecast
from runtime.offload.layer_order import LayerOrder
from runtime.offload.memory import Key

PREFETCH_THRESHOLD = 0.5
"""Probability (0 to 1) above or at which an expert that its layer's next run may need is prefetched.

At one half a prefetch is as likely to be used as to be wasted.
"""


class Policy(Protocol):
    """Observes which experts are used, and predicts which are used next."""

    @property
    def name(self) -> str:
        """Name in reports and logs."""
        ...

    def begin(self) -> None:
        """Starts a batch, the one that the last `expect` forecast."""
        ...

    def expect(self, forecast: LoadForecast | None) -> None:
        """Sets the forecast of the batch after the current one; None means that there is none."""
        ...

    def foresee(self, layer: int, load_E: FloatArray) -> None:
        """Sets the forecast of a layer's next run alone, in tokens `[E]`, made shortly before it."""
        ...

    def observe(self, layer: int, experts: Sequence[int], costs: int) -> None:
        """Records that a layer runs now and needs these experts; `costs` is the tier's `CacheStats.costs` so far."""
        ...

    def next_use(self) -> FloatArray:
        """Layers that will run until each expert's next use, `[L, E]`; the largest is evicted first."""
        ...

    def prefetch_candidates(self) -> list[Key]:
        """Experts to prefetch, the most urgent first; resident experts may be among them."""
        ...


class LruPolicy:
    """Least recently used: loads on demand only, and evicts the expert whose last use is the longest ago."""

    name = "lru"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._next_use_LE = np.zeros((num_layers, num_experts))
        self._clock = 0

    def begin(self) -> None: ...

    def expect(self, forecast: LoadForecast | None) -> None: ...

    def foresee(self, layer: int, load_E: FloatArray) -> None: ...

    def observe(self, layer: int, experts: Sequence[int], costs: int) -> None:
        self._clock += 1
        self._next_use_LE[layer, list(experts)] = -self._clock

    def next_use(self) -> FloatArray:
        return self._next_use_LE

    def prefetch_candidates(self) -> list[Key]:
        return []


class NextUsePolicy:
    """Evicts and prefetches by the probability that each expert is needed in its layer's coming runs.

    This base class uses the past alone: the frequency with which each expert was needed. Subclasses override
    `current` and `upcoming`.

    Args:
        num_layers: L.
        num_experts: E.

    Attributes:
        layer_order: Distance of each layer's next run.
        frequency_LE: Moving average of whether each expert was needed in its layer's runs (0 to 1), `[L, E]`.
        last_LE: Whether each expert was needed in its layer's last run, `[L, E]`.
    """

    name = "history"
    FREQUENCY_EMA = 0.1
    """Weight (0 to 1) of a layer's last run in `frequency_LE`."""
    FIRST_FREQUENCY = 0.25
    """Frequency (0 to 1) assumed before an expert's layer has run."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.layer_order = LayerOrder(num_layers)
        self.frequency_LE = np.full((num_layers, num_experts), self.FIRST_FREQUENCY)
        self.last_LE = np.zeros((num_layers, num_experts), dtype=bool)

    def begin(self) -> None:
        self.layer_order.begin()

    def expect(self, forecast: LoadForecast | None) -> None: ...

    def foresee(self, layer: int, load_E: FloatArray) -> None: ...

    def observe(self, layer: int, experts: Sequence[int], costs: int) -> None:
        self.layer_order.observe(layer)
        self.last_LE[layer] = False
        self.last_LE[layer, list(experts)] = True
        self.frequency_LE[layer] += self.FREQUENCY_EMA * (self.last_LE[layer] - self.frequency_LE[layer])

    def current(self) -> FloatArray:
        """Probability that each expert is needed in the current pass, `[L, E]`."""
        return self.frequency_LE

    def upcoming(self) -> FloatArray:
        """Probability that each expert is needed in the pass after the current one, `[L, E]`."""
        return self.frequency_LE

    def next_run(self, in_pass_L: BoolArray) -> FloatArray:
        """Probability that each expert is needed when its layer runs next, `[L, E]`.

        Args:
            in_pass_L: Whether the layer runs next in the current pass.
        """
        return np.where(in_pass_L[:, None], self.current(), self.upcoming())

    def next_use(self) -> FloatArray:
        """The distance of the layer's next run, and a period of the layer for each run that may not need the expert.

        A layer's next run is 3 layers away and its period is 4. The next run needs the expert with probability .75, the
        one after it with .5, each later one with .25 (the frequency). The expected number of runs that do not need it
        is .25 * (1 + .5 / .25) = .75, and its next use is 3 + 4 * .75 = 6.
        """
        distance_L, in_pass_L, period_L = self.layer_order.distances()
        upcoming_LE, frequency_LE = self.upcoming(), np.clip(self.frequency_LE, 0.01, 1.0)
        first_LE = self.next_run(in_pass_L)
        second_LE = np.where(in_pass_L[:, None], upcoming_LE, frequency_LE)
        unneeded_LE = (1 - first_LE) * (1 + (1 - second_LE) / frequency_LE)
        return np.asarray(distance_L[:, None] + period_L[:, None] * unneeded_LE)

    def prefetch_candidates(self) -> list[Key]:
        """Experts that their layer's next run probably needs: the next layer's first, of these the likeliest first."""
        distance_L, in_pass_L, _ = self.layer_order.distances()
        first_LE = self.next_run(in_pass_L)
        layers, experts = np.nonzero(first_LE >= PREFETCH_THRESHOLD)
        order = np.lexsort((-first_LE[layers, experts], distance_L[layers]))
        return list(zip(layers[order].tolist(), experts[order].tolist(), strict=True))
