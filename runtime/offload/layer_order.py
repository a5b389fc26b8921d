"""LayerOrder: predicts in how many layers each MoE layer runs next, from the order in which layers have run.

A *pass* is one run over layers in ascending order. A forward of encoder and decoder is a pass over all layers, an
encoder alone a pass over its own. In generation each decoder step is a pass that begins at the decoder's first layer,
which in a decoder-only model is the first of all. A pass is expected to run the same layers as the last one that began
with the same layer, and to be followed by a pass that begins where most did that followed such a pass lately.
"""

import numpy as np

from data.arrays import BoolArray, FloatArray

UNSEEN_DISTANCE = 16
"""Number of passes. Assumed distance of a layer that is in no expected pass and has run less than twice.

It only has to exceed the distance of every expected layer, so that such a layer's experts are evicted first.
"""
INTERVAL_EMA = 0.3
"""Weight (0 to 1) of a layer's last interval between two runs in the moving average of its intervals.

Only layers outside the expected pass use it, such as the encoder's during generation: the number of decoder steps
varies from batch to batch, and .3 averages over about three batches.
"""

FOLLOWED_RETENTION = 0.9
"""Share (0 to 1) of what is known of the passes that follow one another that is kept from one pass to the next."""


class LayerOrder:
    """Observes the layers as they run and predicts the distance of each layer's next run.

    Attributes:
        pass_index: Number of the current pass, from 0; -1 before the first.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers, self.pass_index = num_layers, -1
        self._pass: list[int] = []
        self._last_by_first: dict[int, list[int]] = {}
        self._expected = list(range(num_layers))
        self._followed: FloatArray = np.zeros((num_layers, num_layers))  # weight of a pass's first layer after another
        self._clock = 0
        self._last_run: FloatArray = np.full(num_layers, -np.inf)
        self._interval: FloatArray = np.full(num_layers, np.nan)
        self._distances: tuple[FloatArray, BoolArray, FloatArray] | None = None  # until a layer runs

    def begin(self) -> None:
        """Starts a batch: the model's first MoE layer runs next."""
        self._start(0)

    def observe(self, layer: int) -> None:
        """Records that a layer runs now. A layer that is not after the previous one starts a pass."""
        if self.pass_index < 0 or (self._pass and layer <= self._pass[-1]):
            self._start(layer)
        self._pass.append(layer)
        self._distances = None
        self._clock += 1
        if np.isfinite(passed := self._clock - self._last_run[layer]):
            before = self._interval[layer]
            self._interval[layer] = passed if np.isnan(before) else before + INTERVAL_EMA * (passed - before)
        self._last_run[layer] = self._clock

    def _start(self, first: int) -> None:
        if self._pass:
            self._last_by_first[self._pass[0]] = self._pass
            self._followed[self._pass[0]] *= FOLLOWED_RETENTION
            self._followed[self._pass[0], first] += 1
        self._pass, self.pass_index, self._distances = [], self.pass_index + 1, None
        self._expected = self._from(first)

    def _from(self, first: int) -> list[int]:
        """Layers that a pass from this layer on is expected to run."""
        return self._last_by_first.get(first, list(range(first, self.num_layers)))

    def _after(self) -> list[int]:
        """Layers that the next pass is expected to run."""
        followed = self._followed[self._expected[0]]
        return self._from(int(followed.argmax())) if followed.any() else self._expected

    @property
    def pass_length(self) -> int:
        """Number of layers that the current pass is expected to run."""
        return len(self._expected)

    def distances(self) -> tuple[FloatArray, BoolArray, FloatArray]:
        """Distance of each layer's next run.

        After layer 1 of a pass over layers 0 to 3, the distances of layers 2 and 3 are 1 and 2, in the current pass.
        Those of layers 0 and 1 are 3 and 4, in the next pass. The period of all layers is 4.

        Returns:
            Layers that run until the next run, that one counted, `[L]`; whether it is in the current pass, bool `[L]`;
            the period, layers from the next run to the one after it, `[L]`. They are not to be written to.
        """
        if self._distances is None:
            self._distances = self._find_distances()
        return self._distances

    def _find_distances(self) -> tuple[FloatArray, BoolArray, FloatArray]:
        last, after = self._pass[-1] if self._pass else -1, self._after()
        rest = [layer for layer in self._expected if layer > last]
        unseen = UNSEEN_DISTANCE * self.pass_length + np.arange(self.num_layers)
        measured = ~np.isnan(self._interval)
        period: FloatArray = np.where(measured, self._interval, unseen)
        # layers outside the expected pass, such as the encoder's during generation, run after the next pass or later
        distance: FloatArray = np.where(measured, self._last_run + self._interval - self._clock, unseen)
        distance = np.maximum(distance, len(rest) + len(after) + 1)
        distance[after] = len(rest) + 1 + np.arange(len(after))
        distance[rest] = 1 + np.arange(len(rest))
        period[after] = len(after)
        in_pass: BoolArray = np.zeros(self.num_layers, dtype=np.bool_)
        in_pass[rest] = True
        return distance, in_pass, period
