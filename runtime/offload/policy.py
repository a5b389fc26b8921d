"""Policies: when each expert is expected to be needed next. What is due last is evicted, what is due soon is fetched.

Time counts in MoE layers run. Eviction and prefetch follow from one array, so rivals differ in what they expect alone.
Shape suffixes: N passes, L MoE layers, E logical experts.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from data.arrays import BoolArray, FloatArray
from predictor.forecast import LoadForecast
from runtime.offload.layer_order import LayerOrder
from runtime.offload.memory import Key

PREFETCH_THRESHOLD = 0.5
"""Probability from which on an expert is fetched before it is asked for."""


class Policy(Protocol):
    """Follows what is needed and says what comes next."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    def begin(self) -> None:
        """A batch begins; what was expected of it is now being put to the test."""
        ...

    def expect(self, forecast: LoadForecast | None) -> None:
        """The load of the batch that comes after the one under way."""
        ...

    def observe(self, layer: int, experts: Sequence[int], costs: int) -> None:
        """A layer runs now and needs these experts; `costs` is the tally's so far."""
        ...

    def next_use(self) -> FloatArray:
        """Layers run until each expert is needed next, `[L, E]`; of these the largest are evicted."""
        ...

    def prefetch_candidates(self) -> list[Key]:
        """Experts worth fetching ahead, the most urgent first, resident ones among them."""
        ...


class LruPolicy:
    """On demand; evicts what was used the longest ago."""

    name = "lru"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._next_use = np.zeros((num_layers, num_experts))
        self._clock = 0

    def begin(self) -> None:
        """See `Policy`."""

    def expect(self, forecast: LoadForecast | None) -> None:
        """See `Policy`."""

    def observe(self, layer: int, experts: Sequence[int], costs: int) -> None:
        """See `Policy`."""
        self._clock += 1
        self._next_use[layer, list(experts)] = -self._clock

    def next_use(self) -> FloatArray:
        """See `Policy`."""
        return self._next_use

    def prefetch_candidates(self) -> list[Key]:
        """See `Policy`; none."""
        return []


class LfuPolicy(LruPolicy):
    """On demand; evicts what was used the least often."""

    name = "lfu"

    def observe(self, layer: int, experts: Sequence[int], costs: int) -> None:
        """See `Policy`."""
        self._next_use[layer, list(experts)] -= 1


class NextUsePolicy:
    """Base of the policies that expect: probabilities that each expert is needed, in two passes to come.

    Args:
        num_layers: L.
        num_experts: E.
    """

    name = "history"
    RATE = 0.1  # of the running mean of what was needed

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.schedule = LayerOrder(num_layers)
        self.usual_LE = np.full((num_layers, num_experts), 0.25)
        self.last_LE = np.zeros((num_layers, num_experts), dtype=bool)

    def begin(self) -> None:
        """See `Policy`."""
        self.schedule.begin()

    def expect(self, forecast: LoadForecast | None) -> None:
        """See `Policy`; not of use here."""

    def observe(self, layer: int, experts: Sequence[int], costs: int) -> None:
        """See `Policy`."""
        self.schedule.observe(layer)
        self.last_LE[layer] = False
        self.last_LE[layer, list(experts)] = True
        self.usual_LE[layer] += self.RATE * (self.last_LE[layer] - self.usual_LE[layer])

    def current(self) -> FloatArray:
        """Probability that each expert is needed in the pass under way, `[L, E]`."""
        return self.usual_LE

    def upcoming(self) -> FloatArray:
        """Probability that each expert is needed in the pass after it, `[L, E]`."""
        return self.usual_LE

    def next_use(self) -> FloatArray:
        """See `Policy`: each layer's distance, and a pass more for each one that does without the expert."""
        distance_L, now_L, period_L = self.schedule.ahead()
        upcoming_LE, usual_LE = self.upcoming(), np.clip(self.usual_LE, 0.01, 1.0)
        first_LE = np.where(now_L[:, None], self.current(), upcoming_LE)
        second_LE = np.where(now_L[:, None], upcoming_LE, usual_LE)
        passes_LE = (1 - first_LE) * (1 + (1 - second_LE) / usual_LE)
        return np.asarray(distance_L[:, None] + period_L[:, None] * passes_LE)

    def prefetch_candidates(self) -> list[Key]:
        """See `Policy`: by layer, and in each the likeliest first."""
        distance_L, now_L, _ = self.schedule.ahead()
        first_LE = np.where(now_L[:, None], self.current(), self.upcoming())
        layers, experts = np.nonzero(first_LE >= PREFETCH_THRESHOLD)
        order = np.lexsort((-first_LE[layers, experts], distance_L[layers]))
        return list(zip(layers[order].tolist(), experts[order].tolist(), strict=True))


class LastBatchPolicy(NextUsePolicy):
    """Expects what the last batch needed."""

    name = "last"

    def current(self) -> FloatArray:
        """See `NextUsePolicy`."""
        return self.last_LE.astype(np.float64)

    def upcoming(self) -> FloatArray:
        """See `NextUsePolicy`."""
        return self.last_LE.astype(np.float64)


class CosinePolicy(NextUsePolicy):
    """Expects what followed the most similar pass so far, by cosine: MoE-Infinity's idea.

    Past passes are kept as 0/1 matrices; the pass under way is compared by the layers that have run.
    """

    name = "cosine"
    KEPT = 128  # passes

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._passes: list[BoolArray] = []
        self._ran = np.zeros(num_layers, dtype=bool)

    def begin(self) -> None:
        """See `Policy`."""
        self._store()
        super().begin()

    def observe(self, layer: int, experts: Sequence[int], costs: int) -> None:
        """See `Policy`."""
        if self._ran[layer]:
            self._store()
        super().observe(layer, experts, costs)
        self._ran[layer] = True

    def _store(self) -> None:
        if self._ran.any():
            self._passes = [*self._passes, self.last_LE & self._ran[:, None]][-self.KEPT :]
            self._ran[:] = False

    def _nearest(self) -> int | None:
        """Index of the stored pass nearest to what ran of this one; the last while nothing ran."""
        if not self._passes or not self._ran.any():
            return len(self._passes) - 1 if self._passes else None
        stored_NX = np.stack(self._passes)[:, self._ran].reshape(len(self._passes), -1).astype(np.float64)
        seen_X = self.last_LE[self._ran].reshape(-1).astype(np.float64)
        norms_N = np.linalg.norm(stored_NX, axis=1) * np.linalg.norm(seen_X)
        return int(np.argmax(stored_NX @ seen_X / np.maximum(norms_N, 1e-9)))

    def current(self) -> FloatArray:
        """See `NextUsePolicy`."""
        nearest = self._nearest()
        return self.usual_LE if nearest is None else self._passes[nearest].astype(np.float64)

    def upcoming(self) -> FloatArray:
        """See `NextUsePolicy`."""
        nearest = self._nearest()
        if nearest is None:
            return self.usual_LE
        return self._passes[min(nearest + 1, len(self._passes) - 1)].astype(np.float64)


class OraclePolicy(NextUsePolicy):
    """The oracle: knows what every pass needs, and when, for good.

    Args:
        truth: Whether each expert is needed in each pass, `[N, L, E]`.
    """

    name = "oracle"

    def __init__(self, truth: BoolArray) -> None:
        super().__init__(*truth.shape[1:])
        passes, self.truth = len(truth), truth
        # next pass from each one on that needs the expert; one beyond the last is never
        self._next_NLE = np.full((passes + 2, *truth.shape[1:]), np.inf)
        for number in range(passes - 1, -1, -1):
            self._next_NLE[number] = np.where(truth[number], number, self._next_NLE[number + 1])

    def next_use(self) -> FloatArray:
        """See `Policy`: exactly."""
        distance_L, now_L, _ = self.schedule.ahead()
        number = min(max(self.schedule.number, 0), len(self.truth))
        next_LE = np.where(now_L[:, None], self._next_NLE[number], self._next_NLE[number + 1])
        later_LE = now_L.sum() + 1 + np.arange(len(now_L))[:, None] + self.schedule.length * (next_LE - number - 1)
        return np.asarray(np.where(next_LE == number, distance_L[:, None], later_LE))

    def prefetch_candidates(self) -> list[Key]:
        """See `Policy`: all that is ever needed, in order."""
        next_use_LE = self.next_use()
        layers, experts = np.nonzero(np.isfinite(next_use_LE))
        order = np.argsort(next_use_LE[layers, experts], kind="stable")
        return list(zip(layers[order].tolist(), experts[order].tolist(), strict=True))
