"""ReplicatedModel: a Switch model whose experts modules are slots for a while, with all that belongs to them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from data.models.switch import LoadedSwitch
from data.traces.trace import TokenBatch
from runtime.balancing.plan import ReplicationPlan
from runtime.distributed.ranks import Ranks
from runtime.engine.batch import BatchStats, needed_positions
from runtime.engine.controller import Preparation, Transfer
from runtime.experts.layer import ReplicatedExperts, Slots
from runtime.experts.slots import ResidentSlots
from runtime.experts.transfer import WeightTransfer
from runtime.experts.weights import ExpertSource
from runtime.offload.cache import ExpertCache
from runtime.offload.slots import Budget, OffloadedSlots, OffloadTransfer


class ReplicatedModel:
    """Puts slots in, and takes them out again with `close`: the model is then what it was, bit for bit.

    Args:
        switch: The model.
        home: The plan without replicas.
        ranks: The ranks.
        experts: Where weights come from: all of them at once, or within a budget.

    Attributes:
        layers: The slots of every MoE layer, in order.
        transfer: What brings another plan in force.
        cache: What holds experts that do not all fit; None where they do.

    Raises:
        ValueError: If another engine runs the model.
    """

    def __init__(
        self, switch: LoadedSwitch, home: ReplicationPlan, ranks: Ranks, experts: ExpertSource | Budget
    ) -> None:
        self.switch, self._home, self._ranks, self._experts = switch, home, ranks, experts
        self._names = [f"{name}.experts" for name in switch.layout.module_names]
        self._before: list[nn.Module] = [switch.model.get_submodule(name) for name in self._names]
        if any(isinstance(module, ReplicatedExperts) for module in self._before):
            raise ValueError("another engine runs this model; close that one first")
        self._activation = ACT2FN[switch.model.config.dense_act_fn]
        self.cache: ExpertCache | None = None
        slots: Sequence[Slots]
        slots, self.transfer = self._cached(experts) if isinstance(experts, Budget) else self._resident(experts)
        self.layers = [
            ReplicatedExperts(each, phy2log, ranks, home.num_devices)
            for each, phy2log in zip(slots, home.phy2log, strict=True)
        ]
        for name, layer, before in zip(self._names, self.layers, self._before, strict=True):
            switch.model.set_submodule(name, layer.train(before.training))

    def _resident(self, source: ExpertSource) -> tuple[Sequence[Slots], Transfer]:
        layout, own = self.switch.layout, self._home.num_devices // self._ranks.world
        devices = range(self._ranks.rank * own, (self._ranks.rank + 1) * own)
        slots = []
        for layer in range(layout.num_layers):
            shape, like = (layout.d_ff, layout.d_model), self.switch.model.shared.weight
            slots.append(ResidentSlots(self._home, layer, devices, shape, like, self._activation))
            slots[-1].fill(source)
        return slots, WeightTransfer(slots, self._home, self._ranks)

    def _cached(self, budget: Budget) -> tuple[Sequence[Slots], Transfer]:
        like = self.switch.model.shared.weight
        self.cache = budget.open(self.switch.layout, like)
        slots = [
            OffloadedSlots(self.cache, self._home, layer, self._ranks.rank, self._activation, like)
            for layer in range(self.switch.layout.num_layers)
        ]
        return slots, OffloadTransfer(slots, self._home, self.cache, self._ranks)

    def begin(self, tokens: TokenBatch, decoder: TokenBatch | None, read_B: Tensor, prepared: bool) -> None:
        """A batch begins: tells every layer which plan is in force and which of its rows must be computed.

        Args:
            tokens: Encoder tokens `[B, T]`.
            decoder: Decoder tokens `[B, U]`; None computes all of them.
            read_B: The sequences whose encoder states a decoder reads.
            prepared: Whether what was expected of a batch is for this one.
        """
        blank_B = read_B & ~tokens.mask.any(1)  # attention over nothing but padding reads all of it
        encoder = needed_positions(tokens.mask) | blank_B[:, None]
        if self.cache is not None:
            if not prepared:  # what was expected last has been
                self.cache.expect(None)
            self.cache.begin()
        for layer, experts in enumerate(self.layers):
            needed: Tensor | None = encoder
            if layer >= self.switch.layout.num_encoder_layers:
                needed = None if decoder is None else needed_positions(decoder.mask)
            flat = None if needed is None else needed.reshape(-1).to(self.switch.model.device)
            experts.begin(self.transfer.plan.phy2log[layer], flat)

    def end(self) -> None:
        """Ends the batch: until the next one begins, a plain call of the model computes all tokens."""
        for experts in self.layers:
            experts.end()

    def cost(self, elapsed_ms: float, exposed_ms: float, preparation: Preparation | None) -> BatchStats:
        """What the batch that began last took, over all ranks."""

        def stack(read: Callable[[ReplicatedExperts], Any]) -> Any:
            return np.stack([read(experts) for experts in self.layers])

        busy = stack(lambda experts: experts.slots.take_busy_ms())
        waited = stack(lambda experts: [experts.waited.take_ms()])
        times = self._ranks.gather(torch.from_numpy(np.concatenate([busy, waited], -1))).numpy()  # [S, L, own + 1]
        return BatchStats(
            load=stack(lambda experts: experts.load),
            device_load=stack(lambda experts: experts.device_load),
            sent=stack(lambda experts: experts.sent),
            busy_ms=np.concatenate(times[:, :, :-1], axis=-1),
            waited_ms=times[:, :, -1].T if self._ranks.world > 1 else np.zeros((len(self.layers), 1)),
            compute_ms=elapsed_ms,
            exposed_ms=exposed_ms,
            preparation=preparation,
            tiers={} if self.cache is None else {tier.name: tier.stats.to_json() for tier in self.cache.tiers},
        )

    def close(self) -> None:
        """Takes the slots out and gives the memory back."""
        for name, before in zip(self._names, self._before, strict=True):
            self.switch.model.set_submodule(name, before)
        if self.cache is not None:
            self.cache.close()
        if not isinstance(self._experts, Budget):
            self._experts.release()
