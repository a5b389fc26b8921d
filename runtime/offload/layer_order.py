"""LayerOrder: which MoE layer runs when. Passes over the layers repeat, as the last one of their kind went.

A forward of encoder and decoder is a pass over all layers, an encoder alone one over its own; in generation each step
of the decoder is a pass that begins at the decoder's first layer.
"""

import numpy as np

from data.arrays import BoolArray, FloatArray

UNSEEN_DISTANCE = 16
"""Passes until a layer runs that is in no pass of the current kind, as long as it ran but once."""
INTERVAL_EMA = 0.3
"""Weight of a layer's last interval between two runs in the mean of them."""


class LayerOrder:
    """Follows the layers as they run and says how far off each one is.

    Attributes:
        number: Passes begun so far, less one.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers, self.number = num_layers, -1
        self._pass: list[int] = []
        self._known: dict[int, list[int]] = {}
        self._expected = list(range(num_layers))
        self._clock = 0
        self._ran: FloatArray = np.full(num_layers, -np.inf)
        self._interval: FloatArray = np.full(num_layers, np.nan)

    def begin(self) -> None:
        """A batch begins: the next layer to run is the first of all."""
        self._start(0)

    def observe(self, layer: int) -> None:
        """A layer runs now; one that does not come after the last one begins a pass."""
        if self.number < 0 or (self._pass and layer <= self._pass[-1]):
            self._start(layer)
        self._pass.append(layer)
        self._clock += 1
        if np.isfinite(passed := self._clock - self._ran[layer]):
            before = self._interval[layer]
            self._interval[layer] = passed if np.isnan(before) else before + INTERVAL_EMA * (passed - before)
        self._ran[layer] = self._clock

    def _start(self, first: int) -> None:
        if self._pass:
            self._known[self._pass[0]] = self._pass
        self._pass, self.number = [], self.number + 1
        self._expected = self._known.get(first, list(range(first, self.num_layers)))

    @property
    def length(self) -> int:
        """Layers of a pass."""
        return len(self._expected)

    @property
    def started(self) -> int | None:
        """Layer the pass began with; None as long as none ran."""
        return self._pass[0] if self._pass else None

    def ahead(self) -> tuple[FloatArray, BoolArray, FloatArray]:
        """How far off each layer's next run is, whether it is in the pass under way, and how often it runs.

        Returns:
            Layers run until then, at least 1, `[L]`; bool `[L]`; layers run from then until its run after that, `[L]`.
        """
        last = self._pass[-1] if self._pass else -1
        rest = [layer for layer in self._expected if layer > last]
        far = UNSEEN_DISTANCE * self.length + np.arange(self.num_layers)
        known = ~np.isnan(self._interval)
        period: FloatArray = np.where(known, self._interval, far)
        # layers of another kind of pass, the encoder's while the decoder writes, come after the next one, or later
        distance: FloatArray = np.where(known, self._ran + self._interval - self._clock, far)
        distance = np.maximum(distance, len(rest) + self.length + 1)
        distance[self._expected] = len(rest) + 1 + np.arange(self.length)
        distance[rest] = 1 + np.arange(len(rest))
        period[self._expected] = self.length
        now: BoolArray = np.zeros(self.num_layers, dtype=np.bool_)
        now[rest] = True
        return distance, now, period
