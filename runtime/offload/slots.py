"""OffloadedSlots: expert slots over a memory budget, whose weights an `ExpertCache` loads when they are needed.

A replica moves no weights between processes: every process reads what it computes from the model's files. Home experts,
replicas and recently used experts share one budget; the experts with the largest next use are evicted.

Shape suffixes: L MoE layers, E logical experts, P slots of this process, M rows, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.arrays import FloatArray, IntArray
from data.models.layout import MoELayout
from data.models.stored_experts import ExpertReader
from predictor.forecast import LoadForecast, forecast_from_load
from runtime.balancing.plan import ReplicationPlan, SlotMove
from runtime.distributed.device import Stopwatch
from runtime.distributed.ranks import Ranks
from runtime.experts.grouped_mm import ExpertFunction, compute_expert
from runtime.offload.cache import ExpertCache

LOAD_RESOLUTION = 1000
"""Steps per token. Forecast loads are broadcast as integers in units of 1/1000 token, because the broadcast carries
integers; a thousandth of a token is far below what changes a probability."""


@dataclass(frozen=True)
class MemoryBudget:
    """Memory that the experts of each process may take, and the files that hold all experts.

    Attributes:
        device_memory: Bytes where experts are computed, as a number or like '2GiB'.
        host_memory: Bytes of host memory below it, likewise; required for an accelerator, optional on a CPU.
        stored: The experts in these files.
    """

    device_memory: int | str
    host_memory: int | str | None
    stored: ExpertReader

    def open(self, layout: MoELayout, like: Tensor) -> ExpertCache:
        """Opens an expert cache with the dtype and on the device of a tensor.

        Raises:
            ValueError: If files are damaged or incomplete, or the budget does not hold one expert.
        """
        return ExpertCache.open(self.stored, layout, like.dtype, self.device_memory, self.host_memory, like.device)


class OffloadedSlots:
    """The slots of this process in one MoE layer.

    Args:
        cache: Provides the weights.
        plan: The active plan.
        layer: Index of the layer.
        device: Index of this process among the plan's devices.
        function: What an expert computes.
        like: A tensor on the device that computes.

    Attributes:
        span: The process's slots among all slots of the plan.
        expert_P: Logical expert in each of them under the active plan.
    """

    can_overlap = False

    def __init__(
        self,
        cache: ExpertCache,
        plan: ReplicationPlan,
        layer: int,
        device: int,
        function: ExpertFunction,
        like: Tensor,
    ) -> None:
        self.layer, self._cache, self._function = layer, cache, function
        self.span = slice(device * plan.slots_per_device, (device + 1) * plan.slots_per_device)
        self.expert_P = plan.phy2log[layer, self.span]
        self._busy = Stopwatch(like.device, on=False)

    needs_no_sizes = False
    buffers = 0, 0
    """Experts are computed one by one, as they arrive."""

    @property
    def active_buffers(self) -> IntArray:
        """Any: no buffers are computed together."""
        return np.zeros_like(self.expert_P)

    def compute(self, rows_MD: Tensor, size_P: IntArray, plain_P: IntArray, ends: Tensor | None) -> Tensor:
        """Computes resident experts first, while absent ones are loaded; see `runtime.experts.layer.Slots`."""
        result_MD, start_P = torch.empty_like(rows_MD), size_P.cumsum() - size_P
        active = sorted(np.flatnonzero(size_P).tolist(), key=lambda slot: -size_P[slot])  # most rows first
        slot_of = {int(self.expert_P[slot]): slot for slot in active}
        for expert, tensors in self._cache.use(self.layer, list(slot_of)):
            slot = slot_of[expert]
            start, size = int(start_P[slot]), int(size_P[slot])
            target = result_MD.narrow(0, start, size)
            with self._busy:
                part = rows_MD.narrow(0, start, size)
                weights = self._function.ready(tensors)
                compute_expert(part, weights, self._function.between, int(plain_P[slot]), target)
        return result_MD

    def compute_groups(self, rows_MD: Tensor, ends_P: Tensor) -> Tensor:
        """Never called: which experts are to be loaded follows from the sizes."""
        raise NotImplementedError

    def foresee(self, load_E: FloatArray) -> None:
        """Tells the cache what the layer will need of this process when it runs next, in assignments `[E]`."""
        here_E = np.zeros_like(load_E)
        here_E[self.expert_P[self.expert_P >= 0]] = 1
        self._cache.foresee(self.layer, load_E * here_E)

    def measure(self, on: bool) -> None:
        """Begins to measure times anew, or ends it."""
        self._busy.restart(on)

    def take_busy_ms(self) -> list[float]:
        """Milliseconds of computation since the last call, without waiting for experts."""
        return [self._busy.take_ms()]


class OffloadTransfer:
    """Applies plans where experts are cached: no weights are moved, the cache is given the forecast of its experts.

    Args:
        layers: The slots of each MoE layer on this rank, in order.
        plan: The active plan.
        cache: The cache of this rank.
        ranks: The ranks.
    """

    arrived = True

    def __init__(
        self, layers: Sequence[OffloadedSlots], plan: ReplicationPlan, cache: ExpertCache, ranks: Ranks
    ) -> None:
        self.layers, self.plan, self.cache, self.ranks = layers, plan, cache, ranks
        self._target = plan

    def start(self, target: ReplicationPlan, forecast: LoadForecast | None = None) -> list[SlotMove]:
        """Broadcasts rank 0's forecast and passes the part for this rank's experts under `target` to the cache."""
        load = np.zeros((len(self.plan.phy2log), self.plan.num_experts), dtype=np.int64)
        if forecast is not None:
            load = np.rint(LOAD_RESOLUTION * forecast.load).astype(np.int64)
        load_LE = self.ranks.broadcast(load) / LOAD_RESOLUTION
        here_LP = target.phy2log[:, self.layers[0].span]
        here_LE = (here_LP[:, :, None] == np.arange(self.plan.num_experts)).any(1)
        expected = forecast_from_load(load_LE * here_LE, made_at=0, source="rank 0")
        self.cache.expect(expected if load_LE.any() else None)
        self._target = target
        return self.plan.moves_to(target)

    def commit(self) -> ReplicationPlan:
        """Makes the target the active plan; call it between batches."""
        self.plan = self._target
        for slots, phy2log in zip(self.layers, self.plan.phy2log, strict=True):
            slots.expert_P = phy2log[slots.span]
        return self.plan

    def computed(self) -> None:
        """Buffers know themselves who still reads them."""

    def close(self) -> None:
        """The cache is closed by who opened it."""

    def nbytes(self, moves: Sequence[SlotMove]) -> int:
        """Bytes of weights that moves send between slots: none."""
        return 0
