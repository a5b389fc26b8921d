"""ForecastPolicy: keeps and fetches experts by forecasts of their load, and knows how far to trust them.

How far forecasts are trusted is learned while running, so a forecaster that is wrong soon moves
nothing.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from data.arrays import FloatArray
from predictor.forecast import LoadForecast
from runtime.offload.memory import Key
from runtime.offload.policy import LruPolicy, NextUsePolicy, Policy

log = logging.getLogger(__name__)


class NeedProbability:
    """Probability that an expert is needed, by its forecast load, its layer, and how often it is needed.

    Begins with odds equal to the forecast load, which is near the Poisson distribution's as long as loads are small.
    """

    BEGIN = (0.0, 1.0, 0.0)  # weights of: nothing, the load's logarithm, the usual odds' logarithm
    DOUBT = 0.5  # variance of each of these weights
    MEMORY = 0.9  # of what was learned from one batch to the next
    LEAST = 0.02  # tokens, and probability, below which nothing is told apart

    def __init__(self, num_layers: int) -> None:
        self._weight_LK = np.tile(np.array(self.BEGIN), (num_layers, 1))
        self._precision_LKK = np.tile(np.eye(len(self.BEGIN)) / self.DOUBT, (num_layers, 1, 1))

    def probability(self, load_LE: FloatArray, usual_LE: FloatArray) -> FloatArray:
        """Of each expert, `[L, E]`, from its forecast load and the share of past batches that needed it."""
        return _chance((self._features(load_LE, usual_LE) * self._weight_LK[:, None]).sum(-1))

    def observe(self, layer: int, load_E: FloatArray, usual_E: FloatArray, needed_E: FloatArray) -> None:
        """What became of one layer's forecast; `usual_E` as it was when the probability was asked for."""
        x_EK, weight_K = self._features(load_E, usual_E), self._weight_LK[layer]
        precision_KK = self._precision_LKK[layer]
        precision_KK *= self.MEMORY
        precision_KK += (1 - self.MEMORY) / self.DOUBT * np.eye(len(weight_K)) + x_EK.T @ x_EK / 4
        weight_K += np.linalg.solve(precision_KK, x_EK.T @ (needed_E - _chance(x_EK @ weight_K)))

    def _features(self, load: FloatArray, usual: FloatArray) -> FloatArray:
        usual = np.clip(usual, self.LEAST, 1 - self.LEAST)
        return np.stack([np.ones_like(load), np.log(load + self.LEAST), np.log(usual / (1 - usual))], -1)


def _chance(log_odds: FloatArray) -> FloatArray:
    """Never quite sure."""
    return np.asarray(1 / (1 + np.exp(-np.clip(log_odds, -6, 6))))


class ForecastPolicy(NextUsePolicy):
    """Keeps and fetches by forecasts; where there is none, by what is usual."""

    name = "forecast"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._calibration = NeedProbability(num_layers)
        self._now: FloatArray | None = None
        self._next: FloatArray | None = None

    def begin(self) -> None:
        """See `Policy`."""
        super().begin()
        self._now, self._next = self._next, None

    def expect(self, forecast: LoadForecast | None) -> None:
        """See `Policy`."""
        self._next = None if forecast is None else forecast.load

    def observe(self, layer: int, experts: Sequence[int], costs: int) -> None:
        """See `Policy`."""
        usual_E = self.usual_LE[layer].copy()
        super().observe(layer, experts, costs)
        if self.schedule.started:  # a step of the decoder: the forecast was of the whole batch
            self._now = None
        if self._now is not None:
            needed_E = self.last_LE[layer].astype(np.float64)
            self._calibration.observe(layer, self._now[layer], usual_E, needed_E)

    def current(self) -> FloatArray:
        """See `NextUsePolicy`."""
        return self._probability(self._now)

    def upcoming(self) -> FloatArray:
        """See `NextUsePolicy`."""
        return self._probability(self._next)

    def _probability(self, load_LE: FloatArray | None) -> FloatArray:
        return self.usual_LE if load_LE is None else self._calibration.probability(load_LE, self.usual_LE)


class LruFallback:
    """A policy that gives way to least-recently-used where it does not pay.

    Beside the policy a least-recently-used cache is followed on paper. What counts against it are its misses; against
    the policy, experts that were not there when needed (forecast wrongly, or fetched too late for the bandwidth) and
    prefetches nobody used. Where the policy has more, on balance over the last accesses, it is suspended; each time for
    twice as long.

    Args:
        policy: The policy.
        num_layers: L.
        num_experts: E.
        places: Experts the cache holds.

    Attributes:
        fallbacks: Times it was suspended.
        suspended: Whether it is.
    """

    TOLERANCE = 1.1  # costs of the policy for each of the rival's
    WINDOW = 8  # caches full of accesses that the balance goes back
    PATIENCE = 4  # caches full of accesses before the first judgement, and of the first suspension

    def __init__(self, policy: Policy, num_layers: int, num_experts: int, places: int) -> None:
        self.policy, self.places = policy, places
        self.fallbacks, self.suspended = 0, False
        self._recent = LruPolicy(num_layers, num_experts)
        self._held: OrderedDict[Key, None] = OrderedDict()
        self._ours = self._theirs = 0.0
        self._costs, self._wait = 0, float(self.PATIENCE * places)

    @property
    def name(self) -> str:
        """The policy's."""
        return self.policy.name

    def begin(self) -> None:
        """See `Policy`."""
        self.policy.begin()

    def expect(self, forecast: LoadForecast | None) -> None:
        """See `Policy`."""
        self.policy.expect(forecast)

    def observe(self, layer: int, experts: Sequence[int], costs: int) -> None:
        """See `Policy`."""
        self.policy.observe(layer, experts, costs)
        self._recent.observe(layer, experts, costs)
        memory = 1 - min(len(experts) / (self.WINDOW * self.places), 0.5)
        self._ours = memory * self._ours + costs - self._costs
        self._theirs = memory * self._theirs + self._would_miss(layer, experts)
        self._costs, self._wait = costs, self._wait - len(experts)
        if self._wait <= 0:
            self._judge()

    def _would_miss(self, layer: int, experts: Sequence[int]) -> int:
        """Misses of least-recently-used among these experts."""
        count = 0
        for expert in experts:
            key = (layer, expert)
            if key not in self._held:
                count += 1
                if len(self._held) >= self.places:
                    self._held.popitem(last=False)
                self._held[key] = None
            self._held.move_to_end(key)
        return count

    def _judge(self) -> None:
        if self.suspended:
            self.suspended, self._wait = False, float(self.PATIENCE * self.places)
            self._ours = self._theirs  # a fresh start
        elif self._ours > self.TOLERANCE * self._theirs + 1:
            self.suspended, self.fallbacks = True, self.fallbacks + 1
            self._wait = float(self.PATIENCE * self.places * 2**self.fallbacks)
            log.warning(
                "'%s' missed or wasted %.0f experts, least-recently-used misses %.0f; it takes over for %.0f experts",
                self.policy.name, self._ours, self._theirs, self._wait,
            )  # fmt: skip

    def next_use(self) -> FloatArray:
        """See `Policy`."""
        return self._recent.next_use() if self.suspended else self.policy.next_use()

    def prefetch_candidates(self) -> list[Key]:
        """See `Policy`."""
        return [] if self.suspended else self.policy.prefetch_candidates()
