"""ForecastPolicy: evicts and prefetches experts by forecasts of their load, weighted by how reliable forecasts are.

`NeedProbability` converts a forecast load into the probability that an expert is needed; it is fitted online. For a
forecaster that is usually wrong that probability approaches the frequency of use. `LruFallback` switches to
least-recently-used while the forecast policy costs more than LRU would.

Shape suffixes: L MoE layers, E logical experts.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from data.arrays import BoolArray, FloatArray
from predictor.forecast import LoadForecast
from runtime.offload.memory import Key
from runtime.offload.need_probability import NeedProbability
from runtime.offload.policy import LruPolicy, NextUsePolicy, Policy

log = logging.getLogger(__name__)


class ForecastPolicy(NextUsePolicy):
    """Evicts and prefetches by forecasts; by frequency of use while there is no forecast.

    A forecast is of a whole batch. In generation a batch is a first pass and then steps of the same layers, whose needs
    are predicted from the same forecast by a regression of their own. A forecast of one layer's next run, made while
    the layer before it runs, is weighed against that probability by a third one.
    """

    name = "forecast"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._need = NeedProbability(num_layers)
        self._step, self._near = (NeedProbability(num_layers, NeedProbability.BY_FREQUENCY) for _ in range(2))
        self._first_pass = -1
        self._stepped_L = np.zeros(num_layers, dtype=bool)  # layers that ran in a batch's later passes
        self._steps_L = np.zeros(num_layers, dtype=bool)  # the same of this batch, or of the last one until it steps
        self._current_load_LE: FloatArray | None = None
        self._upcoming_load_LE: FloatArray | None = None
        self._foreseen_LE = np.full((num_layers, num_experts), np.nan)
        self._otherwise_LE = np.zeros((num_layers, num_experts))  # probabilities without what was foreseen

    def begin(self) -> None:
        super().begin()
        self._first_pass = self.layer_order.pass_index
        self._steps_L, self._stepped_L = self._stepped_L, np.zeros_like(self._stepped_L)
        self._current_load_LE, self._upcoming_load_LE = self._upcoming_load_LE, None

    def expect(self, forecast: LoadForecast | None) -> None:
        self._upcoming_load_LE = None if forecast is None else forecast.load

    def foresee(self, layer: int, load_E: FloatArray) -> None:
        self._foreseen_LE[layer] = load_E
        self._otherwise_LE[layer] = super().next_run(self.layer_order.distances()[1])[layer]

    def observe(self, layer: int, experts: Sequence[int], costs: int) -> None:
        frequency_E = self.frequency_LE[layer].copy()
        super().observe(layer, experts, costs)
        needed_E = self.last_LE[layer].astype(np.float64)
        if self._in_steps:
            self._stepped_L[layer] = self._steps_L[layer] = True
        if self._current_load_LE is not None:
            regression = self._step if self._in_steps else self._need
            regression.observe(layer, self._current_load_LE[layer], frequency_E, needed_E)
        if not np.isnan(self._foreseen_LE[layer, 0]):
            self._near.observe(layer, self._foreseen_LE[layer], self._otherwise_LE[layer], needed_E)
            self._foreseen_LE[layer] = np.nan

    @property
    def _in_steps(self) -> bool:
        return self.layer_order.pass_index != self._first_pass

    def next_use(self) -> FloatArray:
        """The next use in layers, later by the square root of the number of experts that the layer usually needs.

        Loads for a layer that needs many experts are hidden while its resident ones compute; where a layer needs few,
        each one that is absent is waited for. So the buffers are worth more to the latter. That holds as long as a
        forecast says which of the many to load beforehand. The root was chosen in a simulation of generation on
        training batches (powers of 0 to 1).
        """
        if self._current_load_LE is None and self._upcoming_load_LE is None:
            return super().next_use()
        needed_L = np.maximum(self.frequency_LE.sum(1), 1)
        return np.asarray(super().next_use() * np.sqrt(needed_L / needed_L.min())[:, None])

    def next_run(self, in_pass_L: BoolArray) -> FloatArray:
        foreseen_LE = self._near.probability(self._foreseen_LE, self._otherwise_LE)
        return np.where(np.isnan(foreseen_LE), super().next_run(in_pass_L), foreseen_LE)

    def current(self) -> FloatArray:
        return self._probability(self._step if self._in_steps else self._need, self._current_load_LE)

    def upcoming(self) -> FloatArray:
        """A step of this batch in the layers that steps run, else the next batch."""
        step_LE = self._probability(self._step, self._current_load_LE)
        return np.where(self._steps_L[:, None], step_LE, self._probability(self._need, self._upcoming_load_LE))

    def _probability(self, regression: NeedProbability, load_LE: FloatArray | None) -> FloatArray:
        return self.frequency_LE if load_LE is None else regression.probability(load_LE, self.frequency_LE)


class LruFallback:
    """A policy that is replaced by LRU for a while when it costs more than LRU would.

    A shadow LRU cache is simulated beside the real one. The costs of LRU are its misses. The costs of the policy are
    experts that were not resident when requested (forecast wrongly, or prefetched too late for the bandwidth) and
    prefetches that were evicted unused. If the policy's recent costs exceed LRU's, LRU takes over; the policy is tried
    again later. Each fallback lasts twice as long as the one before.

    Args:
        policy: The policy.
        num_layers: L.
        num_experts: E.
        buffers: Number of experts that the cache holds.

    Attributes:
        fallbacks: Number of times LRU took over.
        suspended: Whether LRU is in use now.
    """

    TOLERANCE = 1.1
    """Ratio of the policy's recent costs to LRU's above which LRU takes over."""
    WINDOW = 8
    """Length of the recent past in requests, as a multiple of the cache's buffers."""
    PATIENCE = 4
    """Requests before the first comparison, and half of the first fallback's, as a multiple of the cache's buffers."""

    def __init__(self, policy: Policy, num_layers: int, num_experts: int, buffers: int) -> None:
        self.policy, self.buffers = policy, buffers
        self.fallbacks, self.suspended = 0, False
        self._lru = LruPolicy(num_layers, num_experts)
        self._shadow: OrderedDict[Key, None] = OrderedDict()
        self._policy_costs = self._lru_costs = 0.0
        self._costs, self._requests_left = 0, float(self.PATIENCE * buffers)

    @property
    def name(self) -> str:
        """Name of the policy."""
        return self.policy.name

    def begin(self) -> None:
        self.policy.begin()

    def expect(self, forecast: LoadForecast | None) -> None:
        self.policy.expect(forecast)

    def foresee(self, layer: int, load_E: FloatArray) -> None:
        self.policy.foresee(layer, load_E)

    def observe(self, layer: int, experts: Sequence[int], costs: int) -> None:
        self.policy.observe(layer, experts, costs)
        self._lru.observe(layer, experts, costs)
        retention = 1 - min(len(experts) / (self.WINDOW * self.buffers), 0.5)
        self._policy_costs = retention * self._policy_costs + costs - self._costs
        self._lru_costs = retention * self._lru_costs + self._shadow_misses(layer, experts)
        self._costs, self._requests_left = costs, self._requests_left - len(experts)
        if self._requests_left <= 0:
            self._compare()

    def _shadow_misses(self, layer: int, experts: Sequence[int]) -> int:
        """Number of these experts that the shadow LRU cache misses."""
        misses = 0
        for expert in experts:
            key = (layer, expert)
            if key not in self._shadow:
                misses += 1
                if len(self._shadow) >= self.buffers:
                    self._shadow.popitem(last=False)
                self._shadow[key] = None
            self._shadow.move_to_end(key)
        return misses

    def _compare(self) -> None:
        if self.suspended:
            self.suspended, self._requests_left = False, float(self.PATIENCE * self.buffers)
            self._policy_costs = self._lru_costs  # costs during the fallback do not count against the policy
        elif self._policy_costs > self.TOLERANCE * self._lru_costs + 1:
            self.suspended, self.fallbacks = True, self.fallbacks + 1
            self._requests_left = float(self.PATIENCE * self.buffers * 2**self.fallbacks)
            log.warning(
                "cache policy '%s' missed or wasted %.0f experts lately, LRU would have missed %.0f; "
                "using LRU for the next %.0f expert requests",
                self.policy.name, self._policy_costs, self._lru_costs, self._requests_left,
            )  # fmt: skip

    def next_use(self) -> FloatArray:
        return self._lru.next_use() if self.suspended else self.policy.next_use()

    def prefetch_candidates(self) -> list[Key]:
        return [] if self.suspended else self.policy.prefetch_candidates()
