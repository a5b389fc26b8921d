"""OffloadedSlots: slots whose experts do not all fit. A plan says what a process may compute, its cache fetches it.

A replica moves nothing between processes: each reads what it computes from the model's files. Homes, replicas and what
was used lately share one budget, and what the forecast needs last gives way.

Shape suffixes: L MoE layers, E logical experts, P slots of this process, M rows, D model width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from data.arrays import IntArray
from data.models.layout import MoELayout
from predictor.forecast import LoadForecast, forecast_from_load
from runtime.balancing.plan import ReplicationPlan, SlotMove, contiguous_homes
from runtime.distributed.device import Stopwatch
from runtime.distributed.ranks import Ranks
from runtime.experts.grouped_mm import compute_expert
from runtime.experts.layer import ReplicatedExperts
from runtime.offload.cache import ExpertCache

LOAD_RESOLUTION = 1000
"""Parts of a token that forecasts are told in."""


@dataclass(frozen=True)
class Budget:
    """What experts may take on each process, and the files that hold all of them.

    Attributes:
        device_memory: Bytes where experts are computed, as a number or like '2GiB'.
        host_memory: Bytes of host memory below that; an accelerator needs some, else None may do.
        files: The file that holds each tensor; see `data.models.weights.ModelWeights`.
    """

    device_memory: int | str
    host_memory: int | str | None
    files: Mapping[str, Path]

    def open(self, layout: MoELayout, like: Tensor) -> ExpertCache:
        """A cache of experts with a tensor's dtype and on its device.

        Raises:
            ValueError: If files are damaged or incomplete, or the budget holds not one expert.
        """
        return ExpertCache.open(self.files, layout, like.dtype, self.device_memory, self.host_memory, like.device)


class OffloadedSlots:
    """The slots of this process in one layer.

    Args:
        cache: Gives experts.
        plan: The plan in force.
        layer: Which row of the plan is this layer's.
        device: Which of the plan's devices this process is.
        activation: Between the two products of an expert.

    Attributes:
        span: This process' slots among all of the plan's.
        expert_P: The expert in each of them, as of the plan in force.
    """

    can_overlap = False

    def __init__(
        self, cache: ExpertCache, plan: ReplicationPlan, layer: int, device: int, activation: nn.Module, like: Tensor
    ) -> None:
        self.layer, self._cache, self._activation = layer, cache, activation
        self.span = slice(device * plan.slots_per_device, (device + 1) * plan.slots_per_device)
        self.expert_P = plan.phy2log[layer, self.span]
        self._busy = Stopwatch(like.device)

    def compute(self, rows_MD: Tensor, size_P: IntArray, plain_P: IntArray) -> Tensor:
        """Computes experts at hand first, while the others are fetched; see `runtime.experts.layer.Slots`."""
        result_MD, start_P = torch.empty_like(rows_MD), size_P.cumsum() - size_P
        active = sorted(np.flatnonzero(size_P).tolist(), key=lambda slot: -size_P[slot])  # the busiest first
        slot_of = {int(self.expert_P[slot]): slot for slot in active}
        for expert, wi_FD, wo_DF in self._cache.use(self.layer, list(slot_of)):
            slot = slot_of[expert]
            start, size = int(start_P[slot]), int(size_P[slot])
            target = result_MD.narrow(0, start, size)
            with self._busy:
                part = rows_MD.narrow(0, start, size)
                compute_expert(part, wi_FD.T, wo_DF.T, self._activation, int(plain_P[slot]), target)
        return result_MD

    def take_busy_ms(self) -> list[float]:
        """Milliseconds computed since the last take, waiting for experts left out."""
        return [self._busy.take_ms()]


class OffloadTransfer:
    """Carries out a plan where experts are cached: nothing moves, but each cache is told what will be needed of it.

    Args:
        layers: The slots of each MoE layer on this rank, in order.
        plan: The plan in force.
        cache: This rank's.
        ranks: The ranks.
    """

    arrived = True

    def __init__(
        self, layers: Sequence[OffloadedSlots], plan: ReplicationPlan, cache: ExpertCache, ranks: Ranks
    ) -> None:
        self.layers, self.plan, self.cache, self.ranks = layers, plan, cache, ranks
        self._target = plan

    def start(self, target: ReplicationPlan, forecast: LoadForecast | None = None) -> list[SlotMove]:
        """Has the cache expect what the forecast, which rank 0 holds, says of this rank's experts under `target`."""
        load = np.zeros((len(self.plan.phy2log), self.plan.num_experts), dtype=np.int64)
        if forecast is not None:
            load = np.rint(LOAD_RESOLUTION * forecast.load).astype(np.int64)
        load_LE = self.ranks.broadcast(load) / LOAD_RESOLUTION
        here_LP = target.phy2log[:, self.layers[0].span]
        here_LE = (here_LP[:, :, None] == np.arange(self.plan.num_experts)).any(1)
        expected = forecast_from_load(load_LE * here_LE, made_at=0, source="told")
        self.cache.expect(expected if load_LE.any() else None)
        self._target = target
        return self.plan.moves_to(target)

    def commit(self) -> ReplicationPlan:
        """Puts the target in force; to be called between batches."""
        self.plan = self._target
        for slots, phy2log in zip(self.layers, self.plan.phy2log, strict=True):
            slots.expert_P = phy2log[slots.span]
        return self.plan

    def nbytes(self, moves: Sequence[SlotMove]) -> int:
        """Bytes moved between places: none."""
        return 0


def install(model: Any, layout: MoELayout, cache: ExpertCache, ranks: Ranks | None = None) -> list[ReplicatedExperts]:
    """Puts slots over this rank's cache in place of a model's experts modules, all experts at home; layers in order."""
    ranks = Ranks() if ranks is None else ranks
    home = ReplicationPlan.at_home(contiguous_homes(layout.num_layers, layout.num_experts), ranks.world, 0)
    activation, layers = ACT2FN[model.config.dense_act_fn], []
    for layer, name in enumerate(layout.module_names):
        slots = OffloadedSlots(cache, home, layer, ranks.rank, activation, model.shared.weight)
        layers.append(ReplicatedExperts(slots, home.phy2log[layer], ranks, ranks.world))
        model.set_submodule(f"{name}.experts", layers[-1])
    return layers
