"""SlotTransfer: moves expert weights into spare places while the model computes, and switches over between batches.

Copies run on a stream of their own where the weights lie on a CUDA device; elsewhere on the thread that calls `start`.
"""

from collections.abc import Sequence

import torch

from runtime.plan import ReplicationPlan, SlotMove
from runtime.slots import SlotWeights


class SlotTransfer:
    """Carries out the moves from one plan to the next.

    Args:
        layers: The slots of each MoE layer, in order.
        plan: The plan in force.
    """

    def __init__(self, layers: Sequence[SlotWeights], plan: ReplicationPlan) -> None:
        self.layers, self.plan = layers, plan
        self._written: list[SlotMove] = []
        self._target: ReplicationPlan | None = None
        cuda = layers[0].wi_NFD.is_cuda
        self._stream = torch.cuda.Stream(layers[0].wi_NFD.device) if cuda else None  # type: ignore[no-untyped-call]
        self._event = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]

    def start(self, target: ReplicationPlan) -> list[SlotMove]:
        """Writes what `target` has elsewhere than the plan in force; nothing changes for running batches."""
        moves = self.plan.moves_to(target)
        if self._stream is not None and self._event is not None:
            # the spare places were last read by batches issued before this point
            self._stream.wait_stream(torch.cuda.default_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                self._write(moves)
                self._event.record(self._stream)
        else:
            self._write(moves)
        self._written, self._target = moves, target
        return moves

    def _write(self, moves: list[SlotMove]) -> None:
        for move in moves:
            self.layers[move.layer].write(move)

    @property
    def arrived(self) -> bool:
        """Whether all weights of the started moves are in place."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def commit(self) -> ReplicationPlan:
        """Puts the started target in force; to be called between batches, once it has `arrived`."""
        assert self._target is not None, "nothing was started"
        if self._event is not None:  # no wait for the host: only what is issued from here on comes after the copies
            torch.cuda.current_stream(self.layers[0].wi_NFD.device).wait_event(self._event)
        for layer, weights in enumerate(self.layers):
            weights.commit(move.slot for move in self._written if move.layer == layer)
        self.plan, self._target, self._written = self._target, None, []
        return self.plan

    def nbytes(self, moves: Sequence[SlotMove]) -> int:
        """Bytes that some moves carry."""
        return sum(self.layers[move.layer].expert_bytes for move in moves)
