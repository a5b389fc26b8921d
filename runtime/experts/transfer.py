"""WeightTransfer: moves expert weights into spare places while the model computes, and switches over between batches.

Weights come from the expert's home, over a process group of their own where that is another rank's. On CUDA, copies run
on a stream of their own; elsewhere on the thread that calls `start`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from predictor.forecast import LoadForecast
from runtime.balancing.plan import ReplicationPlan, SlotMove
from runtime.distributed.ranks import Ranks
from runtime.experts.slots import ResidentSlots


class WeightTransfer:
    """Carries out the moves from one plan to the next; all ranks call its methods in the same order.

    Args:
        layers: The slots of each MoE layer on this rank, in order.
        plan: The plan in force.
        ranks: The ranks.
    """

    def __init__(self, layers: Sequence[ResidentSlots], plan: ReplicationPlan, ranks: Ranks) -> None:
        self.layers, self.plan, self.ranks = layers, plan, ranks
        self._written: list[SlotMove] = []
        self._target: ReplicationPlan | None = None
        self._device = layers[0].wi_NFD.device
        cuda = self._device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(self._device) if cuda else None  # type: ignore[no-untyped-call]
        self._event: Any = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def start(self, target: ReplicationPlan, forecast: LoadForecast | None = None) -> list[SlotMove]:
        """Writes what `target` has elsewhere than the plan in force; nothing changes for running batches."""
        moves = self.plan.moves_to(target)
        if self._stream is not None:  # the spare places were last read by batches issued before this point
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            self._write(moves)
            if self._event is not None:
                self._event.record(self._stream)
        self._written, self._target = moves, target
        return moves

    def _write(self, moves: list[SlotMove]) -> None:
        calls: list[Any] = []
        for move in moves:
            weights, rank = self.layers[move.layer], self.ranks.rank
            here, there = weights.holds(move.slot), weights.holds(move.source)
            if here and there:
                for target, source in zip(weights.standby(move.slot), weights.active(move.source), strict=True):
                    target.copy_(source, non_blocking=True)
            elif here or there:
                other = self.plan.device_of(move.source if here else move.slot)
                assert other != rank
                tensors = weights.standby(move.slot) if here else weights.active(move.source)
                calls += [self._call(here, tensor, other) for tensor in tensors]
        if calls:
            for work in dist.batch_isend_irecv(calls):
                work.wait()

    def _call(self, here: bool, tensor: Tensor, other: int) -> Any:
        return dist.P2POp(dist.irecv if here else dist.isend, tensor, other, group=self.ranks.moves)

    @property
    def arrived(self) -> bool:
        """Whether all weights of the started moves are in place on this rank."""
        return self._event is None or bool(self._event.query())

    def commit(self) -> ReplicationPlan:
        """Puts the started target in force; to be called between batches, once all ranks say it has `arrived`."""
        assert self._target is not None, "nothing was started"
        if self._event is not None:  # no wait for the host: only what is issued from here on comes after the copies
            torch.cuda.current_stream(self._device).wait_event(self._event)
        for layer, weights in enumerate(self.layers):
            weights.commit(move.slot for move in self._written if move.layer == layer)
        self.plan, self._target, self._written = self._target, None, []
        return self.plan

    def nbytes(self, moves: Sequence[SlotMove]) -> int:
        """Bytes that some moves carry."""
        return sum(self.layers[move.layer].expert_bytes for move in moves)
