"""Runs random cases of MoE layers: any geometry, plan and moves, against the plain loop.

The unit is `ReplicatedExperts` over resident or offloaded slots, called as the engine calls it. On several ranks each
has a device and its share of the sequences, and all ranks must run the same cases.

Shape suffixes: B sequences, T tokens, K experts of a token, D model width.
"""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import one_hot

import runtime.experts.layer
from data.models.expert import ExpertFormat
from data.models.layout import MoELayout
from data.models.stored_experts import Part
from data.models.weights import ModelWeights
from predictor.forecast import forecast_from_load
from runtime.balancing.plan import ReplicationPlan
from runtime.distributed.ranks import Ranks
from runtime.experts.layer import ReplicatedExperts
from runtime.experts.slots import ResidentSlots
from runtime.experts.transfer import WeightTransfer
from runtime.offload.cache import LOADERS, ExpertCache
from runtime.offload.expert_files import ExpertFiles
from runtime.offload.forecast_policy import ForecastPolicy, LruFallback
from runtime.offload.memory import PAGE
from runtime.offload.policy import LruPolicy
from runtime.offload.slots import OffloadedSlots, OffloadTransfer
from stress.layer_cases import LayerBatch, LayerCase, computed_positions
from stress.plain_loop import LIMITS, difference, plain_loop

MOVER = ThreadPoolExecutor(1, thread_name_prefix="mover")
"""Moves run on a thread of their own, as the controller's do."""


class Layers:
    """The MoE layers of a case on this rank, as an engine would install them, and their weights for the plain loop.

    Args:
        case: The case.
        ranks: The ranks, which are open.
        folder: Where experts are stored, if they do not fit into memory.
    """

    def __init__(self, case: LayerCase, ranks: Ranks, folder: Path) -> None:
        self.case, self.ranks = case, ranks
        self.rng, self._plans = np.random.default_rng(case.seed), np.random.default_rng([case.seed, 1])
        stored = case.kind if self.rng.integers(2) else torch.float32
        self.stacks = [self._experts(stored) for _ in range(case.layers)]
        homes = np.tile(np.arange(case.experts), (case.layers, 1))
        if self.rng.integers(2):
            homes = self.rng.permuted(homes, axis=1)
        self.home = ReplicationPlan.at_home(homes, case.devices, case.redundant)
        self.cache: ExpertCache | None = None
        slots, self.transfer = self._resident() if not case.budget else self._offloaded(folder)
        nodes = None if case.nodes == 1 else case.devices // case.nodes
        self.layers = [
            ReplicatedExperts(each, phy2log, ranks, case.devices, nodes, case.price)
            for each, phy2log in zip(slots, self.home.phy2log, strict=True)
        ]

    def _experts(self, stored: torch.dtype) -> list[Tensor]:
        """Weights that keep the size of what they are applied to, rounded to the dtype they are stored in."""
        stacks = []
        for number, shape in enumerate(self.case.function.format.shapes):
            scale = 1.0 if len(shape) == 1 else self.case.function.format.shapes[number][-1] ** 0.5
            values = self.rng.standard_normal((self.case.experts, *shape), dtype=np.float32) / np.float32(scale)
            stacks.append(torch.from_numpy(values).to(stored))
        return stacks

    @cached_property
    def computed(self) -> list[list[Tensor]]:
        """Each layer's weights in the dtype that computes."""
        return [[stack.to(self.case.kind) for stack in stacks] for stacks in self.stacks]

    def _resident(self) -> tuple[Any, Any]:
        case, rank = self.case, self.ranks.rank
        devices, like = (
            range(rank, rank + 1) if case.world > 1 else range(case.devices),
            torch.empty(1, dtype=case.kind),
        )
        slots = []
        for layer in range(case.layers):
            whole = self.computed[layer] if self.home.phy2log[layer].tolist() == list(range(case.experts)) else None
            whole = whole if case.devices == 1 and self.rng.integers(2) else None
            shared = case.world > 1 and bool(case.shared)
            slots.append(ResidentSlots(self.home, layer, devices, case.function, like, shared, whole))
            slots[-1].fill(self)
        return slots, WeightTransfer(slots, self.home, self.ranks)

    def fill(self, layer: int, expert: int, buffers: Any) -> None:
        """Writes an expert; see `runtime.experts.weights.ExpertSource`."""
        for buffer, stack in zip(buffers, self.computed[layer], strict=True):
            buffer.copy_(stack[expert])

    def whole(self, layer: int) -> None:
        """None: a layer whose weights serve as the buffers is given them."""

    def release(self) -> None:
        """Nothing refers to the buffers."""

    def _offloaded(self, folder: Path) -> tuple[Any, Any]:
        case, stored = self.case, StoredStacks(folder, self.case.function.format, self.stacks)
        layout = MoELayout(
            "case", "", tuple(("decoder", layer) for layer in range(case.layers)), case.experts, 0, case.width, 0, 0
        )
        files = ExpertFiles(stored, layout, case.kind)
        shape = case.layers, case.experts
        policy = LruFallback(ForecastPolicy(*shape), *shape, case.budget) if self.rng.integers(2) else LruPolicy(*shape)
        reserve = LOADERS * files.reader_bytes + PAGE
        device, host = (count * files.shape.padded_bytes + PAGE for count in (case.budget, case.host))
        memory = (device, host + reserve) if case.host else (device + reserve, None)
        self.cache = ExpertCache(files, policy, *memory)
        slots = [
            OffloadedSlots(
                self.cache, self.home, layer, self.ranks.rank, case.function, torch.empty(1, dtype=case.kind)
            )
            for layer in range(case.layers)
        ]
        return slots, OffloadTransfer(slots, self.home, self.cache, self.ranks)

    def start(self) -> None:
        """Starts moves to a random plan, on any thread; in replica slots any expert may lie, any number of times."""
        phy2log = self.home.phy2log.copy()
        replica = ~self.home.is_home_slot
        phy2log[replica] = self._plans.integers(-1, self.case.experts, int(replica.sum()))
        load = self._plans.exponential(9.0, (self.case.layers, self.case.experts))
        target = self.home.with_slots(phy2log)
        self.transfer.start(target, forecast_from_load(load, made_at=0, source="random"))

    def commit(self) -> None:
        """Makes the started plan active."""
        plan = self.transfer.commit()
        for layer, phy2log in zip(self.layers, plan.phy2log, strict=True):
            layer.change_plan(phy2log)

    def close(self) -> None:
        """Frees everything."""
        self.transfer.close()
        if self.cache is not None:
            self.cache.close()


class StoredStacks:
    """Experts in a file of their own, stacked: an `ExpertReader`."""

    def __init__(self, folder: Path, form: ExpertFormat, stacks: list[list[Tensor]]) -> None:
        self.format = form
        tensors = {
            f"{layer}.{name}": s for layer, each in enumerate(stacks) for name, s in zip(form.names, each, strict=True)
        }
        save_file(tensors, folder / "model.safetensors")
        self.weights = ModelWeights(str(folder))

    def parts(self, layer: int, expert: int) -> list[list[Part]]:
        """Each tensor is a row of its stack."""
        return [[Part(f"{layer}.{name}", expert)] for name in self.format.names]

    def read(self, layer: int, expert: int) -> list[Tensor]:
        """Never called, because nothing is converted."""
        raise NotImplementedError


def _own(ranks: Ranks, computed_BT: Tensor) -> tuple[slice, Tensor]:
    """The sequences of a rank, and which of their positions it computes; where it has none, one without tokens."""
    size = len(computed_BT)
    rows = slice(ranks.rank * size // ranks.world, (ranks.rank + 1) * size // ranks.world)
    if rows.start == rows.stop:
        return slice(0, 1), torch.zeros_like(computed_BT[0])
    return rows, computed_BT[rows].flatten()


@dataclass
class Found:
    """What a case found.

    Attributes:
        compared: Batches that were compared.
        equal: Of these, batches whose outputs equal the loop's to the bit, on this rank.
        largest: Largest difference by dtype.
        moved: Plans that became active.
        dropped: Tokens that were dropped, over all ranks.
    """

    compared: int
    equal: int
    largest: dict[str, float]
    moved: int = 0
    dropped: int = 0


def run_layer_case(case: LayerCase, ranks: Ranks) -> Found:
    """Runs a case on this rank.

    Raises:
        AssertionError: If an output, a count, or a token that is not computed is not what the loop says.
    """
    with tempfile.TemporaryDirectory(dir=_memory()) as folder, _halves(case):
        layers = Layers(case, ranks, Path(folder))
        try:
            return _run(case, layers)
        finally:
            layers.close()


def _memory() -> str | None:
    """A folder in memory, if the system has one: a file for every case wears a disk."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@contextmanager
def _halves(case: LayerCase) -> Iterator[None]:
    """Has layers run in two halves, however few tokens there are."""
    least = runtime.experts.layer.OVERLAP_MIN_TOKENS
    before = dict(least)
    least["cpu"] = 0 if case.halves else 10**9
    yield
    least.update(before)


@torch.no_grad()
def _run(case: LayerCase, layers: Layers) -> Found:
    found = Found(0, 0, {case.dtype: 0.0})
    for _ in range(case.steps):
        computed_BT = computed_positions(case, layers.rng)
        computed_T = _own(layers.ranks, computed_BT)[1]
        skipped_T = None if computed_T.all() else ~computed_T
        if case.moves == "between":
            layers.start()
            layers.commit()
        if layers.cache is not None:
            layers.cache.begin()
        for layer, phy2log in zip(layers.layers, layers.transfer.plan.phy2log, strict=True):
            layer.begin(phy2log, skipped_T, measure=case.seed % 2 == 0)
        moving = MOVER.submit(layers.start) if case.moves == "during" else None
        _compare(case, layers, computed_BT, found)
        if moving is not None:
            moving.result()
        if case.moves == "within":
            layers.start()
        if case.moves in ("during", "within"):
            layers.commit()
            for layer in layers.layers:
                layer.begin_step(skipped_T)
            _compare(case, layers, computed_BT, found)
        found.moved += case.moves != "never"
        for layer in layers.layers:
            layer.end()
        layers.transfer.computed()
    return found


def _compare(case: LayerCase, layers: Layers, computed_BT: Tensor, found: Found) -> None:
    """Runs a batch through all layers and compares it with the loop."""
    equal = True
    for number, layer in enumerate(layers.layers):
        batch = LayerBatch.drawn(case, layers.rng)
        rows, computed_T = _own(layers.ranks, computed_BT)
        hidden_TD, expert_TK, weight_TK = (each[rows].flatten(0, 1) for each in batch)
        choice = expert_TK
        if not case.each:
            dropped_T = expert_TK[:, 0] < 0
            choice = one_hot(expert_TK.clamp(min=0), case.experts) * ~dropped_T[:, None, None]
        before = layer.counters.load.copy(), layer.counters.device_load.sum()
        ours = layer.compute(hidden_TD, choice, weight_TK, training=False)
        function = case.function
        theirs = plain_loop(
            hidden_TD, expert_TK, weight_TK, computed_T, layers.computed[number], function.format, function.between
        )
        worst = difference(ours, theirs)
        found.largest[case.dtype] = max(found.largest[case.dtype], worst)
        equal &= torch.equal(ours, theirs)
        assert worst <= LIMITS[case.kind], f"outputs differ by {worst:.2g} of the largest"
        assert not ours[theirs.eq(0).all(-1) & ~computed_T].any(), "a token that is not computed has an output"
        counted = batch.expert[computed_BT]
        expected = torch.bincount(counted[counted >= 0], minlength=case.experts).numpy()
        load, total = layer.counters.load - before[0], layer.counters.device_load.sum() - before[1]
        assert np.array_equal(load, expected), f"load is counted as {load.tolist()}, expected {expected.tolist()}"
        assert total == expected.sum(), f"devices computed {total} assignments, expected {expected.sum()}"
        found.dropped += int((batch.expert < 0).sum())
    found.compared += 1
    found.equal += equal
