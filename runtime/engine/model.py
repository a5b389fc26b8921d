"""ReplicatedModel: a model whose experts compute in slots, until it is closed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data.arrays import FloatArray, IntArray
from data.models.model import LoadedModel
from data.traces.trace import TokenBatch
from runtime.balancing.plan import ReplicationPlan
from runtime.distributed.device import to_device
from runtime.distributed.ranks import Ranks
from runtime.engine.adapter import adapter_of
from runtime.engine.batch import BatchStats
from runtime.engine.controller import Preparation, Transfer
from runtime.experts.counters import LayerCounters
from runtime.experts.grouped_mm import measure_overhead
from runtime.experts.layer import ReplicatedExperts
from runtime.experts.move_times import measure_between_nodes
from runtime.experts.protocols import Slots
from runtime.experts.slots import ResidentSlots
from runtime.experts.transfer import WeightTransfer
from runtime.experts.weights import ExpertSource
from runtime.offload.cache import ExpertCache
from runtime.offload.layer_ahead import ModelProbes
from runtime.offload.slots import MemoryBudget, OffloadedSlots, OffloadTransfer


class ReplicatedModel:
    """Has a model compute its experts in slots; after `close` the model is what it was, bit for bit.

    Args:
        loaded: The model.
        home: The plan without replicas.
        ranks: The ranks.
        experts: Where weights come from: all of them at once, within a budget, or an open cache, which `close` closes.
        devices_per_node: Devices that share a fast network; None means one node.
        expert_overhead_tokens: Tokens a device computes in the time it takes to read one more expert's weights. 'auto'
            measures it on rank 0's experts of the first layer; within a budget it means 0.

    Attributes:
        layers: The slots of every MoE layer, in order.
        transfer: Makes another plan active.
        expert_overhead_tokens: As given or as measured.
        between_nodes: Time of a move between nodes, relative to one within a node, as measured; None where there is
            nothing to measure.
        cache: Holds experts that do not all fit; None if they do.

    Raises:
        ValueError: If another engine runs the model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        home: ReplicationPlan,
        ranks: Ranks,
        experts: ExpertSource | MemoryBudget | ExpertCache,
        devices_per_node: int | None = None,
        expert_overhead_tokens: int | Literal["auto"] = 0,
    ) -> None:
        self.loaded, self._home, self._ranks, self._experts = loaded, home, ranks, experts
        self.adapter = adapter_of(loaded)
        if self.adapter.installed():
            raise ValueError(
                "another engine runs this model, or one built from the same configuration object; close that one first"
            )
        self.cache: ExpertCache | None = None
        self.probes: ModelProbes | None = None
        slots: Sequence[Slots]
        if isinstance(experts, MemoryBudget | ExpertCache):
            slots, self.transfer = self._cached(experts)
        else:
            slots, self.transfer = self._resident(experts)
        self.expert_overhead_tokens = (
            self._measured_overhead(slots[0]) if expert_overhead_tokens == "auto" else expert_overhead_tokens
        )
        self.between_nodes: float | None = None
        if isinstance(self.transfer, WeightTransfer):
            self.between_nodes = measure_between_nodes(self.transfer, devices_per_node)
        self.layers = [
            ReplicatedExperts(each, phy2log, ranks, home.num_devices, devices_per_node, self.expert_overhead_tokens)
            for each, phy2log in zip(slots, home.phy2log, strict=True)
        ]
        if self.probes is not None:
            for layer, probes in zip(self.layers, self.probes.layers, strict=True):
                layer.probes = probes
        self.adapter.install(self.layers)

    def _resident(self, source: ExpertSource) -> tuple[Sequence[Slots], Transfer]:
        own, shared = self._home.num_devices // self._ranks.world, self._ranks.world > 1
        devices = range(self._ranks.rank * own, (self._ranks.rank + 1) * own)
        in_order = np.arange(self.loaded.layout.num_experts)
        slots = []
        for layer, function in enumerate(self.adapter.functions):
            whole = source.whole(layer) if np.array_equal(self._home.phy2log[layer], in_order) else None
            whole = whole if self._home.num_devices == 1 else None
            slots.append(ResidentSlots(self._home, layer, devices, function, self.adapter.like, shared, whole))
            slots[-1].fill(source)
        return slots, WeightTransfer(slots, self._home, self._ranks)

    def _cached(self, experts: MemoryBudget | ExpertCache) -> tuple[Sequence[Slots], Transfer]:
        like = self.adapter.like
        self.cache = experts if isinstance(experts, ExpertCache) else experts.open(self.loaded.layout, like)
        slots = [
            OffloadedSlots(self.cache, self._home, layer, self._ranks.rank, function, like)
            for layer, function in enumerate(self.adapter.functions)
        ]
        embedding = self.loaded.model.get_input_embeddings()
        self.probes = ModelProbes(
            self.loaded.layout, slots, self.adapter.step_layers, embedding, self.cache, self._ranks
        )
        return slots, OffloadTransfer(slots, self._home, self.cache, self._ranks)

    def _measured_overhead(self, slots: Slots) -> int:
        """As measured, or 0 within a budget, where reading an expert takes no fixed time."""
        return measure_overhead(slots.experts[0], self._ranks) if isinstance(slots, ResidentSlots) else 0

    @property
    def places(self) -> bool:
        """Whether a forecast can place anything: one device that holds all experts has nothing to place."""
        return self._home.num_devices > 1 or self.cache is not None

    @property
    def step_layers(self) -> list[ReplicatedExperts]:
        """The slots of the MoE layers that generation runs once for each token."""
        return self.layers[self.adapter.step_layers]

    @contextmanager
    def batch(
        self,
        tokens: TokenBatch,
        decoder: TokenBatch | None,
        read_B: Tensor,
        prepared: bool,
        measure: bool,
        by_sequence: bool = False,
    ) -> Iterator[None]:
        """A context for one batch: every layer follows the active plan, computes what is needed, and counts.

        Outside of it, as in a plain call of the model, layers compute all positions.

        Args:
            tokens: Tokens of the layers that route the input `[B, T]`.
            decoder: Decoder tokens `[B, U]`; None computes all of them.
            read_B: Sequences whose encoder states a decoder reads.
            prepared: Whether the cache's expectations are for this batch.
            measure: Whether to measure times.
            by_sequence: Whether to count each sequence's load; every layer may run once then.
        """
        device, inputs = self.loaded.model.device, self.loaded.layout.num_input_layers
        skipped_T, skipped_U = (
            None if skipped is None else to_device(skipped, device)
            for skipped in self.adapter.skipped(tokens, decoder, read_B)
        )
        if self.cache is not None:
            if not prepared:  # the last expectations were for a batch that has run
                self.cache.expect(None)
            self.cache.begin()
        if self.probes is not None:
            self.probes.begin()
        for layer, experts in enumerate(self.layers):
            skipped = skipped_T if layer < inputs else skipped_U
            experts.begin(self.transfer.plan.phy2log[layer], skipped, measure, len(tokens.mask) if by_sequence else 0)
        try:
            yield
        finally:
            for experts in self.layers:
                experts.end()
            self.transfer.computed()

    def follow_plan(self) -> None:
        """Has every layer follow the active plan; called after every commit, which changes the weights in the slots."""
        for experts, phy2log in zip(self.layers, self.transfer.plan.phy2log, strict=True):
            experts.change_plan(phy2log)

    def stats(
        self, measure: bool, compute_ms: float, exposed_ms: float, preparation: Preparation | None
    ) -> Callable[[], BatchStats]:
        """What the last batch took, over all ranks, counted when it is asked for.

        Args:
            measure: Whether times were measured; they are taken now, which waits for the device.
            compute_ms: Milliseconds of the forward.
            exposed_ms: Milliseconds of waiting for the preparation.
            preparation: What was done ahead of the batch.
        """
        counters = [experts.counters for experts in self.layers]
        busy, waited = self._take_ms() if measure else self._not_measured()
        tiers = {} if self.cache is None else {tier.name: tier.stats.to_json() for tier in self.cache.tiers}
        return lambda: BatchStats(
            load=np.stack([each.load for each in counters]),
            device_load=np.stack([each.device_load for each in counters]),
            sent=np.stack([each.sent for each in counters]),
            busy_ms=busy, waited_ms=waited, compute_ms=compute_ms, exposed_ms=exposed_ms,
            preparation=preparation, tiers=tiers, sequence_load=_sequence_load(counters),
        )  # fmt: skip

    def _take_ms(self) -> tuple[FloatArray, FloatArray]:
        """Milliseconds each device computed, `[L, G]`, and each rank waited, `[L, S]`."""
        own = np.array([[*experts.slots.take_busy_ms(), experts.waited.take_ms()] for experts in self.layers])
        for experts in self.layers:  # nobody would take the times of plain calls
            experts.measure(False)
        times = self._ranks.gather(torch.from_numpy(own)).numpy()  # [S, L, own + 1]
        waited = times[:, :, -1].T if self._ranks.world > 1 else np.zeros((len(self.layers), 1))
        return np.concatenate(times[:, :, :-1], axis=-1), waited

    def _not_measured(self) -> tuple[FloatArray, FloatArray]:
        layers = len(self.layers)
        return np.full((layers, self._home.num_devices), np.nan), np.full((layers, self._ranks.world), np.nan)

    def close(self) -> None:
        """Takes the slots out of the model and frees their memory, once no copy reads or writes it."""
        self.transfer.close()
        self.adapter.remove()
        if self.cache is not None:
            self.cache.close()
        if not isinstance(self._experts, MemoryBudget | ExpertCache):
            self._experts.release()


def _sequence_load(counters: Sequence[LayerCounters]) -> IntArray | None:
    """Loads of sequences `[B, L, E]`; None if they were not counted, zeros in a layer that did not run."""
    counted = [each.sequence_load for each in counters]
    like = next((load for load in counted if load is not None), None)
    return None if like is None else np.stack([np.zeros_like(like) if load is None else load for load in counted], 1)
