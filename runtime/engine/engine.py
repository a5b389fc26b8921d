"""Engine: runs a Switch model with its experts in slots, replicated ahead of each batch where a forecast says so.

with Engine.from_pretrained("switch-mini-64", predictor="outputs/predictor", redundant=16) as engine:
    for output in engine.run(batches):
        output.logits

Under torchrun each process is a device: it runs its share of every batch's sequences and holds its share of the
experts. Alone, a process emulates the devices.
"""

import hashlib
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor

from data.arrays import IntArray
from data.files import sha256
from data.models.switch import Dtype, LoadedSwitch, load_dense, load_switch
from data.models.weights import ModelWeights
from data.traces.trace import TokenBatch
from predictor.checkpoint import load_predictor
from predictor.forecast import Forecaster
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.balancing.planner import HomePlanner
from runtime.distributed.ranks import Ranks
from runtime.engine.batch import BatchOutput, ModelBatch, forward
from runtime.engine.controller import Controller, Preparation
from runtime.engine.generation import DecoderSteps, ended, sequences_each
from runtime.engine.model import ReplicatedModel
from runtime.experts.weights import ExpertSource, FileWeights, ModuleWeights
from runtime.offload.slots import Budget


class Engine:
    """A Switch model whose experts live in slots over devices.

    Outside its `with` block the model is what it was before, bit for bit.

    Args:
        switch: The model.
        forecaster: What forecasts the coming batch's load; None never replicates.
        devices: G; under torchrun it is the number of processes, alone 8 by default.
        redundant: R, replica slots a layer over all devices.
        homes: Experts in the order of the home slots, `[L, E]`; their own order by default.
        experts: Where expert weights come from, all of them or within a budget; by default the model's own modules.
        timeout_s: Seconds after which another rank that does not answer counts as lost.

    Attributes:
        facts: What all ranks must have alike when they start, by name.

    Raises:
        ValueError: If experts or redundant experts do not divide over the devices, or another engine runs the model.
    """

    def __init__(
        self,
        switch: LoadedSwitch,
        forecaster: Forecaster | None,
        devices: int | None = None,
        redundant: int = 16,
        homes: IntArray | None = None,
        experts: ExpertSource | Budget | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        layout = switch.layout
        self.switch, self.forecaster, self.ranks = switch, forecaster, Ranks(timeout_s)
        order = contiguous_homes(layout.num_layers, layout.num_experts) if homes is None else homes
        devices = self.ranks.devices(devices)
        self.home = ReplicationPlan.at_home(order, devices, redundant)
        self.planner = HomePlanner(devices, redundant)
        self._experts = ModuleWeights(switch.model, layout) if experts is None else experts
        self._open, self._running = False, threading.Lock()
        self.facts = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model": layout.fingerprint(),
            "dtype": str(switch.model.dtype),
            "forecaster": "none" if forecaster is None else forecaster.name,
            "predictor": "none",
            "experts": type(self._experts).__name__,
            "homes and redundant experts": hashlib.sha256(self.home.phy2log.tobytes()).hexdigest()[:16],
        }

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        predictor: Path | str | None = None,
        devices: int | None = None,
        redundant: int = 16,
        revision: str = "",
        dtype: Dtype = "float32",
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        timeout_s: float = 60.0,
    ) -> "Engine":
        """Loads a model and, where given, a predictor trained for it.

        Under torchrun, or within a budget, no process ever holds all experts: each reads those it wants from the files.

        Args:
            model: 'switch-mini-64' (bundled), a local folder, or a hub id.
            predictor: Folder that `train.py` wrote.
            devices: See the class.
            redundant: See the class.
            revision: Revision of a hub model.
            dtype: What the weights are cast to.
            device_memory: Bytes that experts may take where they are computed, such as '2GiB'; the others are fetched
                ahead of need. All of them by default.
            host_memory: Bytes of host memory below that, where computing is done on an accelerator.
            timeout_s: See the class.

        Raises:
            ValueError: If something cannot be loaded, does not belong together, or a budget is too small.
        """
        ranks = Ranks(timeout_s)
        if host_memory is not None and device_memory is None:
            raise ValueError(f"host_memory is {host_memory} without device_memory; give both, or neither")
        if device_memory is not None and ranks.world == 1 and devices not in (None, 1):
            raise ValueError(f"devices is {devices}; within a budget a process is one device: use torchrun for more")
        whole = ranks.world == 1 and device_memory is None
        switch = (load_switch if whole else load_dense)(model, revision, dtype)
        switch.model.to(ranks.device)
        experts: ExpertSource | Budget | None = None
        if device_memory is not None:
            experts = Budget(device_memory, host_memory, ModelWeights(model, revision).files)
            devices, redundant = (1, 0) if ranks.world == 1 else (devices, redundant)
        elif not whole:
            experts = FileWeights(ModelWeights(model, revision), switch.layout)
        engine = cls(switch, None, devices, redundant, experts=experts, timeout_s=timeout_s)
        if predictor is not None:
            table = switch.model.shared.weight.detach()
            engine.forecaster = load_predictor(Path(predictor), switch.layout, table)
            engine.facts["predictor"] = sha256(Path(predictor) / "model.safetensors")
        return engine

    def __enter__(self) -> "Engine":
        if self._open:
            raise RuntimeError("the engine is open already")
        self.ranks.__enter__()
        try:
            self.ranks.check_alike(self.facts)
            self.replicated = ReplicatedModel(self.switch, self.home, self.ranks, self._experts)
        except BaseException:
            if not isinstance(self._experts, Budget):
                self._experts.release()
            self.ranks.__exit__(None, None, None)
            raise
        self._open = True
        self.controller = Controller(self.forecaster, self.planner, self.replicated.transfer, self.ranks)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        self.controller.close()
        self.replicated.close()
        self.ranks.__exit__(kind, error, trace)

    def run(self, batches: Iterable[ModelBatch]) -> Iterator[BatchOutput]:
        """Runs batches in order; while one runs, the next one's placement is prepared.

        All ranks are given the same batches; each runs its share of the sequences. Only before the very first batch is
        there nothing to hide the preparation behind, so it is waited for.

        Raises:
            RankLostError: If another rank is gone.
            RuntimeError: If the engine is not open.
        """
        self._check_open()
        queue = iter(batches)
        current = next(queue, None)
        if current is not None:
            self.controller.prepare(current.tokens)
        first = True
        while current is not None:
            with self._running, self.ranks.watched():
                began = time.perf_counter()
                preparation = self.controller.commit(wait=first)
                exposed_ms = 1e3 * (time.perf_counter() - began)
                upcoming, first = next(queue, None), False
                if upcoming is not None:
                    self.controller.prepare(upcoming.tokens)
                output = self._forward(current, preparation, exposed_ms)
            self.controller.observe(output.stats.load)
            yield output
            current = upcoming

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("the engine is not open; use it inside `with engine:`")

    @torch.inference_mode()
    def _forward(self, batch: ModelBatch, preparation: Preparation | None, exposed_ms: float) -> BatchOutput:
        rows = batch.rows(self.ranks.rank, self.ranks.world)
        own = batch.part(rows)
        read = torch.zeros(len(own.tokens.mask)).bool() if own.decoder is None else own.decoder.mask.any(1)
        self.replicated.begin(own.tokens, own.decoder, read, preparation is not None)
        start = time.perf_counter()
        try:
            logits = forward(self.switch.model, own)
        finally:
            self.replicated.end()
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        elapsed_ms = 1e3 * (time.perf_counter() - start)
        cost = self.replicated.cost(elapsed_ms, exposed_ms, preparation)
        return BatchOutput(logits[: rows.stop - rows.start], rows, cost)

    @torch.inference_mode()
    def generate(self, tokens: TokenBatch, replan_every: int | None = None, **settings: Any) -> Tensor:
        """Greedy text by default: token ids `[b, U]` of this rank's sequences, the same as the plain model's.

        Ranks stay in step until all are done.

        Args:
            tokens: The whole batch, on every rank.
            replan_every: Decoder steps after which the placement follows the loads of the steps before; None leaves it.
            settings: What the model's own `generate` takes.

        Raises:
            RankLostError: If another rank is gone.
            RuntimeError: If the engine is not open.
            ValueError: If `settings` ask for something else than token ids.
        """
        self._check_open()
        batch = ModelBatch(tokens)
        rows = batch.rows(self.ranks.rank, self.ranks.world)
        own, idle = batch.part(rows).tokens, rows.start == rows.stop
        model, device = self.switch.model, self.switch.model.device
        each = sequences_each(settings, model.generation_config)
        if idle:
            settings["stopping_criteria"] = [ended]
        with self._running, self.ranks.watched():
            self.controller.prepare(tokens)
            preparation = self.controller.commit(wait=True)
            self.replicated.begin(own, None, torch.full((len(own.mask),), not idle), preparation is not None)
            encoder = self.switch.layout.num_encoder_layers
            try:
                with DecoderSteps(
                    model, self.replicated.layers, encoder, self.controller, replan_every, idle, settings
                ):
                    ids: Tensor = model.generate(
                        input_ids=own.input_ids.to(device), attention_mask=own.mask.long().to(device),
                        synced_gpus=self.ranks.world > 1, **settings,
                    )  # fmt: skip
            finally:
                self.replicated.end()
        return ids[: each * (rows.stop - rows.start)]
