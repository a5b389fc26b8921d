"""WeightTransfer: copies expert weights into standby buffers while the model computes; a commit makes them active.

Weights are copied from the expert's home, which never changes while the engine is open. A rank *pulls* them from ranks
on its own machine, whose homes it has mapped, so that nobody else takes part; other ranks *send* them over gloo's
background group, on CUDA by way of pinned memory. On CUDA the copies run on a stream of their own, on a CPU on the
thread that calls `start`.
"""

import logging
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from predictor.forecast import LoadForecast
from runtime.balancing.plan import ReplicationPlan, SlotMove
from runtime.distributed.device import BackgroundCopies
from runtime.distributed.ranks import Ranks
from runtime.distributed.shared_block import open_block
from runtime.experts.slots import ResidentSlots, first_buffers

log = logging.getLogger(__name__)


class MappedHomes:
    """The home weights of the other ranks on this machine.

    Args:
        layers: This rank's slots of each MoE layer, in order.
        plan: The plan without replicas; it says where homes are.
        ranks: The ranks, all of which call this.

    Attributes:
        pulls: For each rank, the ranks whose homes it has mapped.
    """

    def __init__(self, layers: Sequence[ResidentSlots], plan: ReplicationPlan, ranks: Ranks) -> None:
        self._slots = plan.phy2log.shape[1] // ranks.world
        own = plan.num_devices // ranks.world
        by_rank = plan.is_home_slot.reshape(len(layers), ranks.world, -1)
        first = [[first_buffers(is_home_P, own) for is_home_P in each] for each in by_rank]
        self._first = [[first_P for first_P, _ in each] for each in first]
        shares = [[block.handle for block in slots.blocks] for slots in layers]
        self._blocks: dict[int, list[list[Tensor]]] = {}
        for rank, (host, handles) in enumerate(ranks.exchange("homes", (ranks.host, shares))):
            if rank == ranks.rank or host != ranks.host or any(None in each for each in handles):
                continue
            try:
                self._blocks[rank] = [
                    [
                        open_block(handle, torch.Size([own * each[rank][1], *block.tensor.shape[1:]]), block.tensor)
                        for handle, block in zip(parts, slots.blocks, strict=True)
                    ]
                    for parts, slots, each in zip(handles, layers, first, strict=True)
                ]
            except (OSError, RuntimeError) as error:
                log.warning("the weights of rank %d cannot be mapped and will be sent instead (%s)", rank, error)
        self.pulls = [set(mapped) for mapped in ranks.exchange("mapped homes", sorted(self._blocks))]

    def home(self, layer: int, slot: int) -> list[Tensor]:
        """The tensors in a home slot of a rank that this one has mapped."""
        rank, slot = divmod(slot, self._slots)
        return [block[self._first[layer][rank][slot]] for block in self._blocks[rank][layer]]


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
        self._copies = BackgroundCopies(layers[0].tensors[0].device)
        self._mapped = MappedHomes(layers, plan, ranks)

    @torch.inference_mode()
    def start(self, target: ReplicationPlan, forecast: LoadForecast | None = None) -> list[SlotMove]:
        """Writes the experts that differ between `target` and the active plan; running batches are not affected."""
        moves = self.plan.moves_to(target)
        with self._copies.issue():
            self._write(moves)
        self._moves, self._target = moves, target
        return moves

    @torch.inference_mode()
    def seconds(self, moves: list[SlotMove]) -> float:
        """Time in which the weights of some moves are written; nothing becomes active. All ranks begin together."""
        self.ranks.all_ready(True)
        began = time.perf_counter()
        with self._copies.issue():
            self._write(moves)
        self._copies.wait()
        return time.perf_counter() - began

    def _write(self, moves: list[SlotMove]) -> None:
        sent: list[tuple[SlotMove, bool]] = []
        for move in moves:
            slots = self.layers[move.layer]
            is_target, is_source = slots.holds(move.slot), slots.holds(move.source)
            pulled = self.owner(move.source) in self._mapped.pulls[self.owner(move.slot)]
            if is_target and (is_source or pulled):
                weights = slots.active(move.source) if is_source else self._mapped.home(move.layer, move.source)
                for target, source in zip(slots.standby(move.slot), weights, strict=True):
                    target.copy_(source, non_blocking=True)
            elif (is_target or is_source) and not pulled:
                sent.append((move, is_target))
        if sent:
            self._exchange(sent)

    def _exchange(self, moves: list[tuple[SlotMove, bool]]) -> None:
        """Sends and receives weights through host memory; on a CPU that is where they are."""
        calls, arriving = [], []
        for move, is_target in moves:
            slots, other = self.layers[move.layer], self.owner(move.source if is_target else move.slot)
            for tensor in slots.standby(move.slot) if is_target else slots.active(move.source):
                host = torch.empty_like(tensor, device="cpu", pin_memory=True) if tensor.is_cuda else tensor
                if is_target:
                    arriving.append((tensor, host))
                elif tensor.is_cuda:
                    host.copy_(tensor, non_blocking=True)
                calls.append(dist.P2POp(dist.irecv if is_target else dist.isend, host, other, self.ranks.background))
        self._copies.wait()
        for work in dist.batch_isend_irecv(calls):
            work.wait()
        for tensor, host in arriving:
            if host is not tensor:
                tensor.copy_(host, non_blocking=True)

    def owner(self, slot: int) -> int:
        """The rank that holds a slot."""
        return self.plan.device_of(slot) * self.ranks.world // self.plan.num_devices

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

    def computed(self) -> None:
        """Notes that a batch has been issued: what it reads is not overwritten before it has run."""
        self._copies.computed()

    def close(self) -> None:
        """Waits for copies under way, before the memory that they read or write is freed."""
        self._copies.wait()

    def nbytes(self, moves: Sequence[SlotMove]) -> int:
        """Bytes of the weights that some moves copy."""
        return sum(self.layers[move.layer].expert_bytes for move in moves)
