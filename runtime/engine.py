"""Engine: runs a Switch model with its experts in slots, replicated ahead of each batch where a forecast says so.

with Engine.from_pretrained("switch-mini-64", predictor="outputs/predictor", redundant=16) as engine:
    for output in engine.run(batches):
        output.logits

Under torchrun each process is a device: it runs its share of every batch's sequences and holds its share of the
experts. Alone, a process emulates the devices.
"""

import hashlib
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN

from data.layout import MoELayout
from data.switch import Dtype, LoadedSwitch, load_dense, load_switch
from data.trace import TokenBatch
from data.weights import ModelWeights
from predictor.checkpoint import load_predictor
from predictor.forecast import Forecaster
from runtime.batch import BatchCost, BatchOutput, ModelBatch, forward, needed
from runtime.controller import Controller, Preparation
from runtime.experts import SlotExperts
from runtime.homes import contiguous_homes
from runtime.peers import Peers
from runtime.plan import IntArray, ReplicationPlan
from runtime.planner import HomePlanner
from runtime.slots import SlotWeights
from runtime.source import ExpertSource, LiveExperts, StoredExperts
from runtime.steps import DecoderSteps, ended
from runtime.transfer import SlotTransfer

EMULATED = 8


class Engine:
    """A Switch model whose experts live in slots over devices.

    Outside its `with` block the model is what it was before, bit for bit.

    Args:
        switch: The model.
        forecaster: What forecasts the coming batch's load; None never replicates.
        devices: G; under torchrun it is the number of processes, alone 8 by default.
        redundant: R, replica slots a layer over all devices.
        homes: Experts in the order of the home slots, `[L, E]`; their own order by default.
        experts: Where expert weights come from; by default the model's own modules.
        timeout_s: Seconds after which another rank that does not answer counts as lost.

    Raises:
        ValueError: If experts or redundant experts do not divide over the devices.
    """

    def __init__(
        self,
        switch: LoadedSwitch,
        forecaster: Forecaster | None,
        devices: int | None = None,
        redundant: int = 16,
        homes: IntArray | None = None,
        experts: ExpertSource | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        layout = switch.layout
        self.switch, self.forecaster, self.peers = switch, forecaster, Peers(timeout_s)
        order = contiguous_homes(layout.num_layers, layout.num_experts) if homes is None else homes
        devices = devices_of(self.peers, devices)
        self.home = ReplicationPlan.at_home(order, devices, redundant)
        self.planner = HomePlanner(devices, redundant)
        self._source = LiveExperts(switch.model, layout) if experts is None else experts
        self._names = [f"{name}.experts" for name in layout.module_names]
        self._before: list[nn.Module] = []
        self._layers: list[SlotExperts] = []

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        predictor: Path | str | None = None,
        devices: int | None = None,
        redundant: int = 16,
        revision: str = "",
        dtype: Dtype = "float32",
        timeout_s: float = 60.0,
    ) -> "Engine":
        """Loads a model and, where given, a predictor trained for it.

        Under torchrun no process ever holds all experts: each reads its own from the model's files.

        Raises:
            ValueError: If either cannot be loaded or they do not belong together.
        """
        alone = Peers().world == 1
        switch = (load_switch if alone else load_dense)(model, revision, dtype)
        source = None if alone else StoredExperts(ModelWeights(model, revision), switch.layout)
        table = switch.model.shared.weight.detach()
        forecaster = None if predictor is None else load_predictor(Path(predictor), switch.layout, table)
        switch.model.to(Peers().device)
        return cls(switch, forecaster, devices, redundant, experts=source, timeout_s=timeout_s)

    def __enter__(self) -> "Engine":
        self.peers.__enter__()
        try:
            self._enter()
        except BaseException:
            self.peers.__exit__(None, None, None)
            raise
        return self

    def _enter(self) -> None:
        model, layout = self.switch.model, self.switch.layout
        self.peers.check_alike(self._facts(layout))
        own = self.home.num_devices // self.peers.world
        devices = range(self.peers.rank * own, (self.peers.rank + 1) * own)
        activation = ACT2FN[model.config.dense_act_fn]
        self._before = [model.get_submodule(name) for name in self._names]
        self._layers, weights = [], []
        for layer, phy2log in enumerate(self.home.phy2log):
            shape = (layout.d_ff, layout.d_model)
            slots = SlotWeights(self.home, layer, devices, shape, model.shared.weight, activation)
            slots.fill(self._source)
            weights.append(slots)
            self._layers.append(SlotExperts(slots, phy2log, self.peers, self.home.num_devices))
        for name, experts in zip(self._names, self._layers, strict=True):
            model.set_submodule(name, experts)
        self.transfer = SlotTransfer(weights, self.home, self.peers)
        self.controller = Controller(self.forecaster, self.planner, self.transfer, self.peers)

    def _facts(self, layout: MoELayout) -> dict[str, str]:
        """What must be alike on all ranks."""
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model": layout.fingerprint(),
            "dtype": str(self.switch.model.dtype),
            "forecaster": "none" if self.forecaster is None else self.forecaster.name,
            "redundant": str(self.home.num_redundant),
            "homes": hashlib.sha256(self.home.phy2log.tobytes()).hexdigest()[:16],
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.controller.close()
        for name, before in zip(self._names, self._before, strict=True):
            self.switch.model.set_submodule(name, before)
        self._source.release()
        self.peers.__exit__(kind, error, trace)

    def run(self, batches: Iterable[ModelBatch]) -> Iterator[BatchOutput]:
        """Runs batches in order; while one runs, the next one's placement is prepared.

        All ranks are given the same batches; each runs its share of the sequences. Only before the very first batch is
        there nothing to hide the preparation behind, so it is waited for.

        Raises:
            PeerLostError: If another rank is gone.
        """
        queue = iter(batches)
        current = next(queue, None)
        if current is not None:
            self.controller.prepare(current.tokens)
        first = True
        while current is not None:
            with self.peers.watched():
                began = time.perf_counter()
                preparation = self.controller.commit(wait=first)
                held_up_ms = 1e3 * (time.perf_counter() - began)
                upcoming, first = next(queue, None), False
                if upcoming is not None:
                    self.controller.prepare(upcoming.tokens)
                output = self._forward(current, preparation, held_up_ms)
            self.controller.observe(output.cost.load)
            yield output
            current = upcoming

    @torch.inference_mode()
    def _forward(self, batch: ModelBatch, preparation: Preparation | None, held_up_ms: float) -> BatchOutput:
        rows = batch.rows(self.peers.rank, self.peers.world)
        own = batch.part(rows)
        self._begin(own.tokens, own.decoder)
        start = time.perf_counter()
        logits = forward(self.switch.model, own)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        elapsed = 1e3 * (time.perf_counter() - start)
        return BatchOutput(logits[: rows.stop - rows.start], rows, self._cost(elapsed, held_up_ms, preparation))

    def _begin(self, tokens: TokenBatch, decoder: TokenBatch | None) -> None:
        """Tells every layer which plan is in force and which of its rows must be computed."""
        for layer, experts in enumerate(self._layers):
            experts.phy2log = self.transfer.plan.phy2log[layer]
            experts.reset()
            rows = tokens if layer < self.switch.layout.num_encoder_layers else decoder
            experts.needed = None if rows is None else needed(rows.mask).reshape(-1).to(self.switch.model.device)

    def _cost(self, elapsed: float, held_up_ms: float, preparation: Preparation | None) -> BatchCost:
        def stack(read: Callable[[SlotExperts], Any]) -> Any:
            return np.stack([read(experts) for experts in self._layers])

        busy = stack(lambda experts: experts.slots.take_busy_ms())
        waited = stack(lambda experts: [experts.waited.take_ms()])
        times = self.peers.gather(torch.from_numpy(np.concatenate([busy, waited], -1))).numpy()  # [S, L, own + 1]
        return BatchCost(
            load=stack(lambda experts: experts.load),
            device_load=stack(lambda experts: experts.device_load),
            sent=stack(lambda experts: experts.sent),
            busy_ms=np.concatenate(times[:, :, :-1], axis=-1),
            waited_ms=times[:, :, -1].T if self.peers.world > 1 else np.zeros((len(self._layers), 1)),
            compute_ms=elapsed,
            held_up_ms=held_up_ms,
            preparation=preparation,
        )

    @torch.inference_mode()
    def generate(self, tokens: TokenBatch, replan_every: int | None = None, **settings: Any) -> Tensor:
        """Greedy text by default: token ids `[b, U]` of this rank's sequences, the same as the plain model's.

        Ranks stay in step until all are done.

        Args:
            tokens: The whole batch, on every rank.
            replan_every: Decoder steps after which the placement follows the loads of the steps before; None leaves it.
            settings: What the model's own `generate` takes.

        Raises:
            PeerLostError: If another rank is gone.
        """
        batch = ModelBatch(tokens)
        rows = batch.rows(self.peers.rank, self.peers.world)
        own, idle = batch.part(rows).tokens, rows.start == rows.stop
        model, device = self.switch.model, self.switch.model.device
        if idle:
            settings["stopping_criteria"] = [ended]
        with self.peers.watched():
            self.controller.prepare(tokens)
            self.controller.commit(wait=True)
            self._begin(own, None)
            encoder = self.switch.layout.num_encoder_layers
            with DecoderSteps(model, self._layers, encoder, self.controller, replan_every, idle, settings):
                ids: Tensor = model.generate(
                    input_ids=own.input_ids.to(device), attention_mask=own.mask.long().to(device),
                    synced_gpus=self.peers.world > 1, **settings,
                )  # fmt: skip
        return ids[: rows.stop - rows.start]

    def peak_gib(self) -> list[float]:
        """Most memory each rank has held so far, in GiB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # Linux counts in KiB
        rows: list[list[float]] = self.peers.gather(torch.tensor([peak])).tolist()
        return [row[0] for row in rows]


def devices_of(peers: Peers, devices: int | None) -> int:
    """The number of devices that was asked for, or that there are.

    Raises:
        ValueError: If there are several processes, but not one for each device.
    """
    if peers.world > 1 and devices not in (None, peers.world):
        raise ValueError(f"devices is {devices}, but {peers.world} processes run; leave it out, or start as many")
    if devices is None:
        return peers.world if peers.world > 1 else EMULATED
    return devices
