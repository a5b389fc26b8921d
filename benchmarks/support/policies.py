"""Rival cache policies for `benchmarks.tiers`: LFU, last batch, cosine-matched history, and the oracle.

Shape suffixes: N passes, L MoE layers, E logical experts, X experts of the layers that have run.
"""

from collections.abc import Sequence

import numpy as np

from data.arrays import BoolArray, FloatArray
from runtime.offload.memory import Key
from runtime.offload.policy import LruPolicy, NextUsePolicy


class LfuPolicy(LruPolicy):
    """Least frequently used: loads on demand only, and evicts the expert that was used the least often."""

    name = "lfu"

    def observe(self, layer: int, experts: Sequence[int], costs: int) -> None:
        self._next_use_LE[layer, list(experts)] -= 1


class LastBatchPolicy(NextUsePolicy):
    """Predicts that every pass needs what the last one needed."""

    name = "last"

    def current(self) -> FloatArray:
        return self.last_LE.astype(np.float64)

    def upcoming(self) -> FloatArray:
        return self.last_LE.astype(np.float64)


class CosinePolicy(NextUsePolicy):
    """Predicts what the most similar past pass needed, by cosine similarity: the idea of MoE-Infinity.

    Past passes are kept as 0/1 matrices; the current pass is compared by the layers that have run.
    """

    name = "cosine"
    KEPT = 128
    """Number of past passes to compare with."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._passes: list[BoolArray] = []
        self._ran_L = np.zeros(num_layers, dtype=bool)

    def begin(self) -> None:
        self._store()
        super().begin()

    def observe(self, layer: int, experts: Sequence[int], costs: int) -> None:
        if self._ran_L[layer]:
            self._store()
        super().observe(layer, experts, costs)
        self._ran_L[layer] = True

    def _store(self) -> None:
        if self._ran_L.any():
            self._passes = [*self._passes, self.last_LE & self._ran_L[:, None]][-self.KEPT :]
            self._ran_L[:] = False

    def _nearest(self) -> int | None:
        """Index of the past pass most similar to the current one; the last one before any layer has run."""
        if not self._passes or not self._ran_L.any():
            return len(self._passes) - 1 if self._passes else None
        past_NX = np.stack(self._passes)[:, self._ran_L].reshape(len(self._passes), -1).astype(np.float64)
        current_X = self.last_LE[self._ran_L].reshape(-1).astype(np.float64)
        norms_N = np.linalg.norm(past_NX, axis=1) * np.linalg.norm(current_X)
        return int(np.argmax(past_NX @ current_X / np.maximum(norms_N, 1e-9)))

    def current(self) -> FloatArray:
        nearest = self._nearest()
        return self.frequency_LE if nearest is None else self._passes[nearest].astype(np.float64)

    def upcoming(self) -> FloatArray:
        nearest = self._nearest()
        if nearest is None:
            return self.frequency_LE
        return self._passes[min(nearest + 1, len(self._passes) - 1)].astype(np.float64)


class OraclePolicy(NextUsePolicy):
    """Belady's optimum: knows the experts that every pass needs.

    Args:
        truth: Whether each expert is needed in each pass, `[N, L, E]`.
    """

    name = "oracle"

    def __init__(self, truth: BoolArray) -> None:
        super().__init__(*truth.shape[1:])
        passes, self.truth = len(truth), truth
        # for each pass, the first pass from it on that needs the expert; infinite where none does
        self._next_NLE = np.full((passes + 2, *truth.shape[1:]), np.inf)
        for index in range(passes - 1, -1, -1):
            self._next_NLE[index] = np.where(truth[index], index, self._next_NLE[index + 1])

    def next_use(self) -> FloatArray:
        """The exact number of layers until each expert's next use; infinite if it is never used again."""
        distance_L, in_pass_L, _ = self.layer_order.distances()
        index = min(max(self.layer_order.pass_index, 0), len(self.truth))
        next_LE = np.where(in_pass_L[:, None], self._next_NLE[index], self._next_NLE[index + 1])
        layers_L1 = np.arange(len(in_pass_L))[:, None]
        later_LE = in_pass_L.sum() + 1 + layers_L1 + self.layer_order.pass_length * (next_LE - index - 1)
        return np.asarray(np.where(next_LE == index, distance_L[:, None], later_LE))

    def prefetch_candidates(self) -> list[Key]:
        """All experts that are used again, by next use."""
        next_use_LE = self.next_use()
        layers, experts = np.nonzero(np.isfinite(next_use_LE))
        order = np.argsort(next_use_LE[layers, experts], kind="stable")
        return list(zip(layers[order].tolist(), experts[order].tolist(), strict=True))
