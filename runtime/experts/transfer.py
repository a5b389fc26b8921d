"""WeightTransfer: copies expert weights into standby buffers while the model computes; a commit makes them active.

Weights are copied from the expert's home. If another rank holds it, they are sent over the background process group.
On CUDA the copies run on a stream of their own, on a CPU on the thread that calls `start`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from predictor.forecast import LoadForecast
from runtime.balancing.plan import ReplicationPlan, SlotMove
from runtime.distributed.device import BackgroundCopies
from runtime.distributed.ranks import Ranks
from runtime.experts.slots import ResidentSlots


class WeightTransfer:
    """Carries out the moves from one plan to the next; all ranks must call its methods in the same order.

    Args:
        layers: This rank's slots of each MoE layer, in order.
        plan: The active plan.
        ranks: The ranks.
    """

    def __init__(self, layers: Sequence[ResidentSlots], plan: ReplicationPlan, ranks: Ranks) -> None:
        self.layers, self.plan, self.ranks = layers, plan, ranks
        self._moves: list[SlotMove] = []
        self._target: ReplicationPlan | None = None
        self._copies = BackgroundCopies(layers[0].wi_NFD.device)

    @torch.inference_mode()
    def start(self, target: ReplicationPlan, forecast: LoadForecast | None = None) -> list[SlotMove]:
        """Writes the experts that differ between `target` and the active plan; running batches are not affected."""
        moves = self.plan.moves_to(target)
        with self._copies.issue():
            self._write(moves)
        self._moves, self._target = moves, target
        return moves

    def _write(self, moves: list[SlotMove]) -> None:
        calls: list[Any] = []
        for move in moves:
            slots, rank = self.layers[move.layer], self.ranks.rank
            is_target, is_source = slots.holds(move.slot), slots.holds(move.source)
            if is_target and is_source:
                for target, source in zip(slots.standby(move.slot), slots.active(move.source), strict=True):
                    target.copy_(source, non_blocking=True)
            elif is_target or is_source:
                other = self.plan.device_of(move.source if is_target else move.slot)
                assert other != rank
                tensors = slots.standby(move.slot) if is_target else slots.active(move.source)
                calls += [self._call(is_target, tensor, other) for tensor in tensors]
        if calls:
            for work in dist.batch_isend_irecv(calls):
                work.wait()

    def _call(self, is_target: bool, tensor: Tensor, other: int) -> Any:
        return dist.P2POp(dist.irecv if is_target else dist.isend, tensor, other, group=self.ranks.background)

    @property
    def arrived(self) -> bool:
        """Whether this rank holds all weights of the started moves."""
        return self._copies.finished

    def commit(self) -> ReplicationPlan:
        """Makes the started target the active plan; call it between batches, once it has `arrived` on all ranks."""
        assert self._target is not None, "commit without start"
        self._copies.before_later_work()
        for layer, slots in enumerate(self.layers):
            slots.commit(move.slot for move in self._moves if move.layer == layer)
        self.plan, self._target, self._moves = self._target, None, []
        return self.plan

    def nbytes(self, moves: Sequence[SlotMove]) -> int:
        """Bytes of the weights that some moves copy."""
        return sum(self.layers[move.layer].expert_bytes for move in moves)
