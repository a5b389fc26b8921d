"""Engine: runs a Switch model with its experts in slots, replicated ahead of each batch where a forecast says so.

with Engine.from_pretrained("switch-mini-64", predictor="outputs/predictor", devices=8, redundant=16) as engine:
    for output in engine.run(batches):
        output.logits
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from data.switch import LoadedSwitch, load_switch
from data.trace import TokenBatch
from predictor.checkpoint import load_predictor
from predictor.forecast import Forecaster
from runtime.controller import Controller, Preparation
from runtime.experts import SlotExperts
from runtime.homes import contiguous_homes
from runtime.plan import IntArray, ReplicationPlan
from runtime.planner import HomePlanner
from runtime.slots import SlotWeights
from runtime.transfer import SlotTransfer


@dataclass(frozen=True)
class ModelBatch:
    """One batch for an encoder-decoder model.

    Attributes:
        tokens: Encoder tokens `[B, T]`.
        decoder: Decoder input tokens `[B, U]`; None runs the encoder alone.
    """

    tokens: TokenBatch
    decoder: TokenBatch | None = None


@dataclass(frozen=True)
class BatchCost:
    """What a batch took.

    Attributes:
        load: Dispatched tokens of each expert, `[L, E]`.
        device_load: Tokens each device computed, `[L, G]`.
        busy_ms: Milliseconds each device computed experts, `[L, G]`.
        compute_ms: Milliseconds of the whole forward.
        preparation: What was done ahead of this batch; None where nothing was ready.
    """

    load: IntArray
    device_load: IntArray
    busy_ms: npt.NDArray[np.float64]
    compute_ms: float
    preparation: Preparation | None


@dataclass(frozen=True)
class BatchOutput:
    """A batch's answer and what it took.

    Attributes:
        logits: `[B, U, V]`, or the encoder's last hidden state `[B, T, D]` where the decoder did not run.
        cost: What it took.
    """

    logits: Tensor
    cost: BatchCost


class Engine:
    """A Switch model whose experts live in slots over `devices` devices (emulated in one process).

    Outside its `with` block the model is the plain one, bit for bit.

    Args:
        switch: The model.
        forecaster: What forecasts the coming batch's load; None never replicates.
        devices: G.
        redundant: R, replica slots a layer over all devices.
        homes: Experts in the order of the home slots, `[L, E]`; their own order by default.

    Raises:
        ValueError: If experts or redundant experts do not divide over the devices.
    """

    def __init__(
        self,
        switch: LoadedSwitch,
        forecaster: Forecaster | None,
        devices: int = 8,
        redundant: int = 16,
        homes: IntArray | None = None,
    ) -> None:
        layout = switch.layout
        self.switch, self.forecaster = switch, forecaster
        order = contiguous_homes(layout.num_layers, layout.num_experts) if homes is None else homes
        self.home = ReplicationPlan.at_home(order, devices, redundant)
        self.planner = HomePlanner(devices, redundant)
        self._names = [f"{name}.experts" for name in layout.module_names]
        self._plain: list[nn.Module] = []
        self._layers: list[SlotExperts] = []

    @classmethod
    def from_pretrained(
        cls, model: str, predictor: Path | str | None = None, devices: int = 8, redundant: int = 16, revision: str = ""
    ) -> "Engine":
        """Loads a model and, where given, a predictor trained for it.

        Raises:
            ValueError: If either cannot be loaded or they do not belong together.
        """
        switch = load_switch(model, revision)
        table = switch.model.shared.weight.detach()
        forecaster = None if predictor is None else load_predictor(Path(predictor), switch.layout, table)
        return cls(switch, forecaster, devices, redundant)

    def __enter__(self) -> "Engine":
        model, self._layers = self.switch.model, []
        self._plain = [model.get_submodule(name) for name in self._names]
        for layer, (name, plain) in enumerate(zip(self._names, self._plain, strict=True)):
            members = list(plain.children())
            weights = SlotWeights(members, self.home, layer)
            activation = members[0].get_submodule("act")
            self._layers.append(SlotExperts(weights, activation, self.home.phy2log[layer]))
            model.set_submodule(name, self._layers[-1])
        self.transfer = SlotTransfer([experts.weights for experts in self._layers], self.home)
        self.controller = Controller(self.forecaster, self.planner, self.transfer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.controller.close()
        for name, plain, experts in zip(self._names, self._plain, self._layers, strict=True):
            self.switch.model.set_submodule(name, plain)
            experts.weights.release()

    def run(self, batches: Iterable[ModelBatch]) -> Iterator[BatchOutput]:
        """Runs batches in order; while one runs, the next one's placement is prepared.

        Only before the very first batch is there nothing to hide the preparation behind, so it is waited for.
        """
        queue = iter(batches)
        current = next(queue, None)
        if current is not None:
            self.controller.prepare(current.tokens)
        first = True
        while current is not None:
            preparation = self.controller.commit(wait=first)
            upcoming, first = next(queue, None), False
            if upcoming is not None:
                self.controller.prepare(upcoming.tokens)
            output = self._forward(current, preparation)
            self.controller.observe(output.cost.load)
            yield output
            current = upcoming

    @torch.inference_mode()
    def plain_forward(self, batch: ModelBatch) -> Tensor:
        """What the plain model answers: its own experts modules, put back for this one batch."""
        model = self.switch.model
        for name, plain in zip(self._names, self._plain, strict=True):
            model.set_submodule(name, plain)
        try:
            return forward(model, batch)
        finally:
            for name, experts in zip(self._names, self._layers, strict=True):
                model.set_submodule(name, experts)

    @torch.inference_mode()
    def _forward(self, batch: ModelBatch, preparation: Preparation | None) -> BatchOutput:
        self._begin(batch)
        start = time.perf_counter()
        logits = forward(self.switch.model, batch)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        elapsed = 1e3 * (time.perf_counter() - start)
        load = np.stack([experts.load for experts in self._layers])
        device_load = np.stack([experts.device_load for experts in self._layers])
        busy_ms = np.stack([experts.busy_ms for experts in self._layers])
        return BatchOutput(logits, BatchCost(load, device_load, busy_ms, elapsed, preparation))

    def _begin(self, batch: ModelBatch | None) -> None:
        """Tells every layer which plan is in force and which of its rows are real tokens."""
        for layer, experts in enumerate(self._layers):
            experts.phy2log = self.transfer.plan.phy2log[layer]
            experts.reset()
            tokens = None
            if batch is not None:
                tokens = batch.tokens if layer < self.switch.layout.num_encoder_layers else batch.decoder
            experts.mask = None if tokens is None else tokens.mask.reshape(-1).to(self.switch.model.device)

    @torch.inference_mode()
    def generate(self, tokens: TokenBatch, **settings: Any) -> Tensor:
        """Greedy text by default: token ids `[B, U]`, the same as the plain model's `generate` with these settings."""
        self.controller.prepare(tokens)
        self.controller.commit(wait=True)
        self._begin(ModelBatch(tokens))
        device = self.switch.model.device
        ids: Tensor = self.switch.model.generate(
            input_ids=tokens.input_ids.to(device), attention_mask=tokens.mask.long().to(device), **settings
        )
        self.controller.observe(np.stack([experts.load for experts in self._layers]))
        return ids


@torch.inference_mode()
def forward(model: Any, batch: ModelBatch) -> Tensor:
    """The model's answer to a batch, plain or with slots: logits `[B, U, V]`, or encoder states `[B, T, D]`."""
    ids, attention = batch.tokens.input_ids.to(model.device), batch.tokens.mask.long().to(model.device)
    if batch.decoder is None:
        states: Tensor = model.encoder(input_ids=ids, attention_mask=attention)[0]
        return states
    decoder_ids = batch.decoder.input_ids.to(model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=attention, decoder_input_ids=decoder_ids).logits
    return logits
