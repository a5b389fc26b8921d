"""Schedule: which MoE layer runs when. Passes over the layers repeat, as the last one of their kind went.

A forward of encoder and decoder is a pass over all layers, an encoder alone one over its own; in generation each step
of the decoder is a pass that begins at the decoder's first layer.
"""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
FAR = 16
"""Passes until a layer that is in no pass of the current kind is taken to run again."""


class Schedule:
    """Follows the layers as they run and says how far off each one is.

    Attributes:
        number: Passes begun so far, less one.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers, self.number = num_layers, -1
        self._pass: list[int] = []
        self._known: dict[int, list[int]] = {}
        self._expected = list(range(num_layers))

    def begin(self) -> None:
        """A batch begins: the next layer to run is the first of all."""
        self._start(0)

    def observe(self, layer: int) -> None:
        """A layer runs now; one that does not come after the last one begins a pass."""
        if self.number < 0 or (self._pass and layer <= self._pass[-1]):
            self._start(layer)
        self._pass.append(layer)

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

    def ahead(self) -> tuple[FloatArray, BoolArray]:
        """How far off each layer's next run is, and whether it is in the pass under way.

        Returns:
            Layers run until then, at least 1, `[L]`; and bool `[L]`.
        """
        distance: FloatArray = np.arange(self.num_layers) + np.float64(FAR * self.length)
        now: BoolArray = np.zeros(self.num_layers, dtype=np.bool_)
        last = self._pass[-1] if self._pass else -1
        rest = [layer for layer in self._expected if layer > last]
        distance[self._expected] = len(rest) + 1 + np.arange(self.length)
        distance[rest] = 1 + np.arange(len(rest))
        now[rest] = True
        return distance, now
