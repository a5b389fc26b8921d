"""Engine: runs a Mixture of Experts with expert parallelism.

Before each batch, experts that are forecast to be hot are copied into replica slots. Outputs equal the unmodified
model's.

    with Engine("switch-mini-64", predictor="outputs/predictor", num_redundant_experts=16) as engine:
        for output in engine.run(batches):
            print(output.logits.shape, output.stats.balancedness)

Under torchrun each process is one device: it runs its share of every batch's sequences and holds its share of the
experts. A single process emulates several devices.
"""

import hashlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from data.arrays import IntArray
from data.files import code_digest
from data.models.device import Device
from data.models.generation import GenerationSettings
from data.models.model import Dtype
from predictor.checkpoint import local_folder
from predictor.choice import Choice
from predictor.forecast import Forecaster
from runtime.balancing.node_rows import NodeRows
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.balancing.planner import HomePlanner
from runtime.distributed.device import Stopwatch, to_device
from runtime.distributed.ranks import Ranks
from runtime.engine.arguments import check_arguments
from runtime.engine.batch import BatchOutput, ModelBatch, check_tokens, forward
from runtime.engine.controller import Controller, Preparation
from runtime.engine.generation import DecoderSteps, draws_of, ended, generation_tokens
from runtime.engine.loading import device_of, load, open_predictor
from runtime.engine.model import ReplicatedModel
from runtime.offload.probe_file import PROBES, restore_probes, save_probes
from runtime.offload.slots import MemoryBudget

PER_SEQUENCE = {"decoder_input_ids", "decoder_attention_mask", "position_ids", "token_type_ids"}
"""Settings of `generate` with one row for each sequence."""
REDUNDANT = 16
"""Replica slots of each MoE layer over several devices, unless told otherwise."""


class Engine:
    """A Mixture of Experts whose experts live in slots over devices, with replicas of the hot ones.

    Inside the `with` block, `run` balances batch after batch, `generate` writes text, and the model itself can be
    called as usual. After the block the model is what it was before, bit for bit.

    Args:
        model: A model of transformers in evaluation mode (Switch, or a decoder-only family; docs/models.md lists them),
            'switch-mini-64' (bundled), a local model folder, or a hub id. Under torchrun, or with `device_memory`, give
            a folder or an id: each process then reads only the experts that it needs.
        predictor: A folder that `train.py` wrote, a hub id of one, or any `Forecaster`.
        num_devices: G, devices that the experts are spread over: under torchrun the number of processes; else 1 on
            CUDA, and on a CPU 8, which it emulates.
        num_redundant_experts: R, replica slots of each MoE layer over all devices; None is 16, or 0 on one device.
        forecast: What forecasts: "adaptive" the predictor, which goes on learning from the batches that run; "learned"
            the predictor as it was trained; "last" the last batch, "ema" a moving average; "none" nothing, and nothing
            is replicated. "auto" is a `Forecaster` that is given, "adaptive" for a predictor, or "last" or "ema" where
            that did better on the predictor's validation batches; without a predictor "none".
        max_moves: Most experts copied before one batch, over all layers; None sets no limit.
        devices_per_node: Devices that share a fast network; copies and tokens then stay within a node where balance
            allows it. None means one node. On several ranks the price of a copy between nodes is measured.
        num_groups: Groups of consecutive experts that stay on one node, copies included, for routers that choose groups
            first (group-limited routing); needs `devices_per_node`.
        expert_overhead_tokens: Tokens a device computes in the time it takes to read one more expert's weights. The
            planner then balances device times, and the split leaves replicas without tokens where they cost more than
            they save. 'auto' measures it when the engine opens; with `device_memory` 'auto' means 0.
        homes: Experts in the order of the home slots, `[L, E]`, or the expert of each home slot and -1 for each replica
            slot, `[L, P]`; in their own order by default.
        revision: Revision of a hub model.
        device: "cpu" or "cuda"; None takes CUDA where this process has a device. A model object stays where it is.
        dtype: Data type that a model given by name is loaded in; None is bfloat16 on CUDA, which grouped products need
            to be fast, and float32 on a CPU. Float32 is the exact mode: see docs/gpu.md.
        device_memory: Bytes for experts on the device that computes, such as '2GiB'; the other experts are read from
            the model's files ahead of need. None keeps all experts in memory.
        host_memory: Bytes of host memory below an accelerator's.
        measure: Whether times are measured; on CUDA that takes events, and waits for the device after each batch. None
            measures on a CPU only.
        timeout_s: Seconds after which a rank that does not respond counts as lost.
        must_agree: Further settings that must be the same on all ranks, by name.

    Raises:
        TypeError: If `model` is of no class that can be run.
        ValueError: If something cannot be loaded or does not fit together; the message says what to do.
    """

    def __init__(
        self,
        model: Any,
        predictor: Forecaster | Path | str | None = None,
        num_devices: int | None = None,
        num_redundant_experts: int | None = None,
        *,
        forecast: Choice = "auto",
        max_moves: int | None = None,
        devices_per_node: int | None = None,
        num_groups: int | None = None,
        expert_overhead_tokens: int | Literal["auto"] = 0,
        homes: IntArray | None = None,
        revision: str = "",
        device: Device | None = None,
        dtype: Dtype | None = None,
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        measure: bool | None = None,
        timeout_s: float = 60.0,
        must_agree: Mapping[str, str] | None = None,
    ) -> None:
        self.ranks = Ranks(timeout_s, device_of(model, device))
        check_arguments(
            self.ranks.world, num_devices, num_redundant_experts, max_moves, devices_per_node, num_groups,
            expert_overhead_tokens, device_memory, host_memory,
        )  # fmt: skip
        if device_memory is not None and self.ranks.world == 1:
            num_devices, num_redundant_experts = 1, 0
        cuda = self.ranks.device.type == "cuda"
        self.measure = not cuda if measure is None else measure
        dtype = dtype or ("bfloat16" if cuda else "float32")
        self.loaded, self._weights = load(model, revision, dtype, device_memory, host_memory, self.ranks)
        layout = self.loaded.layout
        self.forecaster, digest = open_predictor(self.loaded, predictor, forecast)
        self._folder: Path | None = None
        if isinstance(predictor, str | Path) and device_memory is not None:
            self._folder = local_folder(predictor)
        order = contiguous_homes(layout.num_layers, layout.num_experts) if homes is None else homes
        devices = self.ranks.devices(num_devices)
        if num_redundant_experts is None:
            num_redundant_experts = REDUNDANT if devices > 1 else 0
        self.home = ReplicationPlan.at_home(order, devices, num_redundant_experts)
        self.planner = HomePlanner(devices, num_redundant_experts, max_moves, devices_per_node, num_groups=num_groups)
        if num_groups is not None and devices_per_node is not None:
            NodeRows.of(self.home, num_groups, devices_per_node)  # refuses homes that part a group
        self.devices_per_node, self.expert_overhead_tokens = devices_per_node, expert_overhead_tokens
        self._open, self._running = False, threading.Lock()
        self._facts = {
            "switchcast": code_digest() if self.ranks.world > 1 else "",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model": layout.fingerprint(),
            "dtype": str(self.loaded.model.dtype),
            "forecaster": "none" if self.forecaster is None else self.forecaster.name,
            "predictor": digest,
            "experts": type(self._weights).__name__,
            "homes and redundant experts": hashlib.sha256(self.home.phy2log.tobytes()).hexdigest()[:16],
            "max_moves, devices_per_node and num_groups": f"{max_moves}, {devices_per_node}, {num_groups}",
            "expert_overhead_tokens": str(expert_overhead_tokens),
        } | dict(must_agree or {})

    def __enter__(self) -> "Engine":
        if self._open:
            raise RuntimeError("the engine is open already")
        self.ranks.__enter__()
        try:
            self.ranks.check_alike(self._facts)
            self.replicated = ReplicatedModel(
                self.loaded, self.home, self.ranks, self._weights, self.devices_per_node, self.expert_overhead_tokens
            )
            self._restore_probes()
        except BaseException:
            if not isinstance(self._weights, MemoryBudget):
                self._weights.release()
            self.ranks.__exit__(None, None, None)
            raise
        self._open = True
        forecaster = self.forecaster if self.replicated.places else None
        planner = replace(self.planner, expert_overhead_tokens=self.replicated.expert_overhead_tokens)
        if self.replicated.between_nodes is not None:
            planner = replace(planner, between_nodes=self.replicated.between_nodes)
        self.controller = Controller(forecaster, planner, self.replicated.transfer, self.ranks)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open = False
        self.controller.close()
        try:
            if error[0] is None and self.ranks.device.type == "cuda":  # a rank may still copy from this one's homes
                with self.ranks.watched():
                    self.ranks.all_ready(True)
        finally:
            self.replicated.close()
            self.ranks.__exit__(*error)

    def _restore_probes(self) -> None:
        if self.replicated.probes is None or self._folder is None:
            return
        try:
            restore_probes(self._folder, self.replicated.probes, self.loaded.layout)
        except BaseException:
            self.replicated.close()  # gives the model its own experts back, and frees the budget
            raise

    def save_probes(self, folder: Path | str) -> Path:
        """Writes what the probes of the next layer have learned to a predictor's folder; returns the file.

        An engine with that predictor and `device_memory` begins with them. On several ranks rank 0 writes its own.

        Raises:
            RuntimeError: If the engine is not open.
            ValueError: If the engine has no probes, or there is no such folder.
        """
        self._check_open()
        if (probes := self.replicated.probes) is None:
            raise ValueError("this engine has no probes, because all experts are in memory; set device_memory")
        if self.ranks.rank > 0:
            return Path(folder) / PROBES
        return save_probes(Path(folder), probes, self.loaded.layout)

    def run(self, batches: Iterable[ModelBatch | Mapping[str, Any]]) -> Iterator[BatchOutput]:
        """Runs batches in order; while one runs, the placement for the next one is prepared.

        `batches` is read one item ahead. On several ranks each is given the same batches and runs its share of the
        sequences. Only the very first batch waits for its preparation, because nothing runs before it.

        Args:
            batches: What a tokenizer returns (`input_ids`, `attention_mask`), with `decoder_input_ids` or `labels` if
                the decoder of an encoder-decoder model is to be fed more than its start token; or `ModelBatch` objects.

        Raises:
            RankLostError: If another rank is gone.
            RuntimeError: If the engine is not open.
            TypeError: If a batch is none of these.
        """
        self._check_open()
        if isinstance(batches, Mapping):
            raise TypeError("run takes an iterable of batches and got one batch; write run([batch])")
        return self._run(ModelBatch.of(batch, self.loaded.model.config) for batch in batches)

    def _run(self, queue: Iterator[ModelBatch]) -> Iterator[BatchOutput]:
        controller, current, first = self.controller, next(queue, None), True
        if current is not None:
            controller.prepare(current.tokens)
        while current is not None:
            upcoming, failure = _read(queue)  # outside the lock, because the caller's iterator may use the engine
            if not self._open or self.controller is not controller:
                raise RuntimeError("the engine was closed while its batches were running; call run again")
            with self._running, self.ranks.watched():
                began = time.perf_counter()
                preparation = controller.commit(wait=first)
                exposed_ms = 1e3 * (time.perf_counter() - began)
                self.replicated.follow_plan()
                if upcoming is not None:
                    controller.prepare(upcoming.tokens)
                output = self._forward(current, preparation, exposed_ms)
            if self.replicated.places:  # else nobody uses it, and on CUDA the look would wait for the device
                controller.observe(output.stats.load, current.tokens, output.stats.sequence_load)
            yield output
            if failure is not None:
                raise failure
            current, first = upcoming, False

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("the engine is not open; use it inside `with engine:`")

    @torch.no_grad()
    def _forward(self, batch: ModelBatch, preparation: Preparation | None, exposed_ms: float) -> BatchOutput:
        rows = batch.rows(self.ranks.rank, self.ranks.world)
        own = batch.part(rows)
        read = torch.zeros(len(own.tokens.mask)).bool() if own.decoder is None else own.decoder.mask.any(1)
        with self.replicated.batch(
            own.tokens, own.decoder, read, preparation is not None, self.measure, self.controller.learns_sequences
        ):
            stopwatch = Stopwatch(self.loaded.model.device, self.measure)
            with stopwatch:
                logits = forward(self.loaded.model, own)
        compute_ms = stopwatch.take_ms() if self.measure else float("nan")
        stats = self.replicated.stats(self.measure, compute_ms, exposed_ms, preparation)
        return BatchOutput(logits[: rows.stop - rows.start], rows, stats)

    @torch.no_grad()
    def generate(
        self, inputs: Any = None, generation_config: Any = None, *, replan_every: int | None = None, **settings: Any
    ) -> Tensor:
        """Writes text as the model's own `generate` does: token ids `[b, U]` of this rank's sequences.

        The ids are those that the plain model writes; with `do_sample` on several ranks, each draws on its own. Ranks
        stay in step until all sequences are done.

        Args:
            inputs: What a tokenizer returns, or token ids `[B, T]`; `input_ids=` and `attention_mask=` do as
                well. On several ranks each is given the whole batch.
            generation_config: As in transformers.
            replan_every: Decoder steps after which the placement follows the loads of the steps before; None keeps the
                placement.
            settings: Whatever else the model's own `generate` takes, but `inputs_embeds` and
                `return_dict_in_generate`.

        Raises:
            RankLostError: If another rank is gone.
            RuntimeError: If the engine is not open.
            ValueError: If `settings` ask for something else than token ids.
        """
        self._check_open()
        model, device = self.loaded.model, self.loaded.model.device
        wanted = GenerationSettings.of(model, generation_config, settings)
        batch = ModelBatch(generation_tokens(inputs, settings, wanted.pad))
        check_tokens(batch.tokens, model.config)
        rows = batch.rows(self.ranks.rank, self.ranks.world)
        own, idle = batch.part(rows).tokens, rows.start == rows.stop
        for name in [name for name in PER_SEQUENCE if settings.get(name) is not None]:
            settings[name] = settings[name][slice(0, 1) if idle else rows]
        if idle:
            settings["stopping_criteria"] = [ended]
        with self._running, self.ranks.watched():
            self.controller.prepare(batch.tokens)
            preparation = self.controller.commit(wait=True)
            self.replicated.follow_plan()
            read = torch.full((len(own.mask),), not idle)
            prompt = own.mask.shape[1] if self.loaded.layout.causal else 0
            mask = own.mask | (idle and self.loaded.layout.causal)  # sampling refuses attention to nothing
            steps = DecoderSteps(self.replicated, self.controller, replan_every, idle, wanted, prompt)
            drawing = draws_of(self.ranks.rank, self.ranks.world if wanted.samples else 1, device)
            with self.replicated.batch(own, None, read, preparation is not None, measure=False), steps, drawing:
                ids: Tensor = model.generate(
                    input_ids=to_device(own.input_ids, device), attention_mask=to_device(mask.long(), device),
                    generation_config=generation_config, synced_gpus=self.ranks.world > 1, **settings,
                )  # fmt: skip
        return ids[: wanted.sequences_each * (rows.stop - rows.start)]


def _read(queue: Iterator[ModelBatch]) -> tuple[ModelBatch | None, Exception | None]:
    """The next batch, or the error of reading it, which is raised once the batch before it has run."""
    try:
        return next(queue, None), None
    except Exception as error:
        return None, error
