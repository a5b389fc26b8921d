"""Compares cache policies for experts that do not fit in memory: one budget, recorded routing, real reads.

    python -m benchmarks.support.make_switch --out outputs/switch-base-64 --experts 64 --blocks 4 --capacity 16
    python -m benchmarks.tiers --model outputs/switch-base-64 --predictor outputs/predictor
    python -m benchmarks.tiers --model outputs/switch-base-64 --predictor outputs/predictor --ranks 2

    python -m benchmarks.support.make_qwen3 --out outputs/qwen3-wide-64
    python -m benchmarks.tiers --model outputs/qwen3-wide-64 --recorded qwen3-mini-64 --mode generate --sequences 2 \
        --predictor outputs/qwen3-mini-64/predictor

Weights are random, have switch-base's or Qwen3-30B-A3B's sizes, and are read from disk past the page cache. Which
experts are needed was recorded from a bundled model's routers on real text. An arm is one policy, or all experts
resident. Arms take turns; each turn starts with an empty cache, and its first batches are not counted. On a GPU the
budget is GPU memory, and host memory below it holds all experts. On several ranks each rank has its share of the
sequences, of the experts and of the budget. Prints tables and, in a pipe, one line of JSON with the figures of every
arm.
"""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch.distributed.run import main as torchrun

from benchmarks.support.machine import ResidentPeak, ThrottledFiles, read_speed, touch
from benchmarks.support.policies import CosinePolicy, LastBatchPolicy, LfuPolicy, OraclePolicy
from benchmarks.support.recorded import Mode, RecordedBatch, RecordedRouter, play_back, record
from benchmarks.support.recorded_probes import foresee, learn
from benchmarks.support.turns import Turn, over_ranks, show, stats_since, summarise
from data.cli import from_command_line, print_json, user_errors
from data.models.layout import MoELayout
from data.models.model import LoadedModel, load_dense, load_model
from data.models.stored_experts import stored_experts
from data.models.weights import BUNDLED, ModelWeights
from data.text.batching import BatchingConfig
from predictor.baselines.history import Ema
from predictor.checkpoint import load_predictor
from predictor.forecast import Forecaster, forecast_from_load
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.distributed.ranks import Ranks
from runtime.engine.batch import ModelBatch, forward
from runtime.engine.model import ReplicatedModel
from runtime.offload.cache import LOADERS, ExpertCache
from runtime.offload.forecast_policy import ForecastPolicy, LruFallback
from runtime.offload.layer_ahead import State
from runtime.offload.memory import PAGE
from runtime.offload.policy import LruPolicy, Policy
from runtime.offload.stats import CacheStats

POLICIES: dict[str, Callable[[int, int], Policy]] = {
    "all_resident": LruPolicy,
    "lru": LruPolicy,
    "lfu": LfuPolicy,
    "last": LastBatchPolicy,
    "cosine": CosinePolicy,
}
"""Arms that need only the numbers of layers and experts; a new policy is added here."""
ARMS = (*POLICIES, "ours_history", "ours_batch", "ours_new", "ours", "oracle")
SEEN, TRAINING = ("steady", "drift", "every_10", "every_1"), 100
"""Phases from which probes learn before the arm "ours", and batches of each, at most."""


class Bench:
    """What all turns share: the model, the recorded batches, the forecaster and this rank's experts."""

    def __init__(
        self, model: str, batches: list[RecordedBatch], learned: list[RecordedBatch], small: LoadedModel,
        predictor: Path | None, mode: Mode, ranks: Ranks,
    ) -> None:  # fmt: skip
        self.loaded, self.batches, self.mode, self.ranks = load_dense(model), batches, mode, ranks
        touch(self.loaded.model)
        self.loaded.to(ranks.device)
        self.layout: MoELayout = self.loaded.layout
        self.stored = stored_experts(ModelWeights(model), self.loaded.model, self.layout)
        if (has := geometry(self.layout)) != (wanted := geometry(small.layout)):
            raise ValueError(
                f"{model} has (family, MoE layers, experts, experts of a token) = {has}, the recording has {wanted}; "
                "see the options of make_switch and make_qwen3"
            )
        self.routers: list[RecordedRouter] = play_back(self.loaded.model, self.layout)
        homes = contiguous_homes(self.layout.num_layers, self.layout.num_experts)
        self.home = ReplicationPlan.at_home(homes, ranks.world, 0)
        self.own_E = np.arange(self.layout.num_experts) * ranks.world // self.layout.num_experts == ranks.rank
        self.forecaster: Forecaster | None = None
        if predictor is not None:
            self.forecaster = load_predictor(
                predictor, small.layout, small.model.get_input_embeddings().weight.detach().float()
            )
        self.loads = np.stack([batch.load(self.layout) for batch in batches])
        self.forecast_ms: list[float] = []
        self.small, self.learned = small, learned
        self.probes: State | None = None

    def policy(self, arm: str, buffers: int) -> Policy:
        """A new policy for an arm."""
        shape = (self.layout.num_layers, self.layout.num_experts)
        if arm == "oracle":
            passes = [needed_LE for batch in self.batches for needed_LE in batch.passes(self.layout, self.mode)]
            return OraclePolicy(np.stack(passes) & self.own_E)
        if arm.startswith("ours"):
            return LruFallback(ForecastPolicy(*shape), *shape, buffers)
        return POLICIES[arm](*shape)

    def turn(self, arm: str, budget: float, warm: int, mbps: float | None = None) -> Turn:
        """Runs all batches with one arm's cache."""
        files = ThrottledFiles(self.stored, self.layout, torch.float32, mbps=mbps)
        buffers = int((1.0 if arm == "all_resident" else budget) * len(files) / self.ranks.world)
        memory = self.memory(files, buffers)
        turn, policy = Turn(), self.policy(arm, buffers)
        with (
            ResidentPeak() as peak,
            ExpertCache(files, policy, *memory, self.ranks.device) as cache,
            closing(ReplicatedModel(self.loaded, self.home, self.ranks, cache)) as replicated,
            ThreadPoolExecutor(1) as forecasting,
        ):
            if arm == "all_resident":
                for layer in range(self.layout.num_layers):
                    list(cache.use(layer, np.flatnonzero(self.own_E).tolist()))
            hook = self.foresee(replicated, arm)
            before = CacheStats()
            ready = forecasting.submit(self._forecast, arm, cache, 0)
            for number, batch in enumerate(self.batches):
                if number == warm:
                    before = replace(cache.tiers[0].stats)
                began = time.perf_counter()
                ready.result()
                own = self.own_sequences(batch)
                decoder = None if self.mode == "generate" or self.layout.causal else own.decoder
                with replicated.batch(own.tokens, decoder, own.decoder.mask.any(1), prepared=True, measure=False):
                    if number + 1 < len(self.batches):
                        ready = forecasting.submit(self._forecast, arm, cache, number + 1)
                    self.run(own)
                if number >= warm:
                    turn.seconds.append(time.perf_counter() - began)
                    turn.tokens.append(self.tokens(batch))
            if hook is not None:
                hook.remove()
            turn.stats = over_ranks(stats_since(cache.tiers[0].stats, before), self.ranks)
        turn.resident_peak = int(self.ranks.gather(torch.tensor(peak.grown)).sum())
        turn.fallbacks = getattr(policy, "fallbacks", 0)
        return turn

    def foresee(self, replicated: ReplicatedModel, arm: str) -> Any:
        """Has the arms "ours" and "ours_new" forecast from layer to layer, and no other; returns the handle of a hook.

        The probes of "ours" have learned from training batches before, those of "ours_new" begin with the turn.
        """
        if arm not in ("ours", "ours_new"):
            replicated.probes = None
            for layer in replicated.layers:
                layer.probes = None
            return None
        assert replicated.probes is not None
        handle = foresee(
            replicated, self.routers, self.small.model.get_input_embeddings(), self.layout.d_model, self.mode
        )
        if arm == "ours":
            if self.probes is None:
                learn(replicated.probes, self.learned, self.layout, self.layout.d_model)
                self.probes = replicated.probes.state()
            replicated.probes.restore(self.probes)
        return handle

    def memory(self, files: ThrottledFiles, buffers: int) -> tuple[int, int | None]:
        """Bytes of the device tier, and of host memory below a GPU, which then holds all experts."""
        experts, readers = files.shape.padded_bytes, LOADERS * files.reader_bytes
        if self.ranks.device.type == "cpu":
            return buffers * experts + readers + PAGE, None
        return buffers * experts + PAGE, len(files) * experts + readers + PAGE

    def _forecast(self, arm: str, cache: ExpertCache, number: int) -> None:
        """Forecasts a batch and tells the cache, as the controller does while the batch before it runs."""
        forecaster = Ema(0.5) if arm == "ours_history" else self.forecaster if arm.startswith("ours") else None
        known = self.loads[: max(number - 1, 0)]  # while a batch is forecast, the one before it runs
        if forecaster is None or (arm == "ours_history" and not len(known)):
            return
        began = time.perf_counter()
        forecast = forecaster.forecast(self.batches[number].tokens, known)
        self.forecast_ms.append(1e3 * (time.perf_counter() - began))
        cache.expect(forecast_from_load(forecast.load * self.own_E, made_at=number, source=forecast.source))

    def tokens(self, batch: RecordedBatch) -> int:
        """Tokens that the model runs, without padding."""
        return batch.tokens.num_tokens + (0 if self.mode == "encoder" else batch.decoder.num_tokens)

    def own_sequences(self, batch: RecordedBatch) -> RecordedBatch:
        """This rank's share of a batch."""
        return batch.part(ModelBatch(batch.tokens).rows(self.ranks.rank, self.ranks.world))

    @torch.inference_mode()
    def run(self, own: RecordedBatch) -> None:
        """Runs this rank's sequences through the model, with the experts modules that it has now."""
        device = self.ranks.device
        for router in self.routers:
            router.begin(own)
        if self.mode == "generate":
            steps = own.steps(self.layout)
            self.loaded.model.generate(
                input_ids=own.tokens.input_ids.to(device), attention_mask=own.tokens.mask.long().to(device),
                max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
            )  # fmt: skip
        else:
            decoder = own.decoder if self.mode == "full" and not self.layout.causal else None
            forward(self.loaded.model, ModelBatch(own.tokens, decoder))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def plain(self, model: str, warm: int) -> Turn:
        """Runs all batches with the model's own experts modules, all in memory."""
        own_modules, names = load_model(model).model.to(self.ranks.device), self.layout.modules
        offloaded = [self.loaded.model.get_submodule(name) for name in names]
        for name in names:
            self.loaded.model.set_submodule(name, own_modules.get_submodule(name))
        turn = Turn()
        for number, batch in enumerate(self.batches):
            began = time.perf_counter()
            self.run(self.own_sequences(batch))
            if number >= warm:
                turn.seconds.append(time.perf_counter() - began)
                turn.tokens.append(self.tokens(batch))
        for name, module in zip(names, offloaded, strict=True):
            self.loaded.model.set_submodule(name, module)
        return turn


def geometry(layout: MoELayout) -> tuple[str, int, int, int]:
    """What a recording and the model that repeats it must share."""
    return layout.family, layout.num_layers, layout.num_experts, layout.experts_per_token


def tiers(
    model: str = "outputs/switch-base-64",
    recorded: str = BUNDLED,
    predictor: Path | None = None,
    budget: float = 0.25,
    sequences: int = 8,
    length: int = 64,
    mode: Mode = "full",
    phases: tuple[str, ...] = ("drift", "every_10", "every_1", "unseen"),
    per_phase: int = 4,
    warm: int = 4,
    turns: int = 3,
    arms: tuple[str, ...] = ARMS,
    plain: bool = False,
    mbps: float | None = None,
    ranks: int = 1,
) -> None:
    """Runs the benchmark.

    Args:
        model: Folder made by make_switch or make_qwen3 with as many layers and experts as the recorded model.
        recorded: Bundled model whose routing is recorded.
        predictor: Folder that train.py wrote for the recorded model; without it, 'ours' has no forecasts.
        budget: Share of the bytes of all experts (0 to 1).
        sequences: Number of sequences of a batch.
        length: Largest number of tokens of a sequence; a decoder-only model that generates gets half of them as its
            prompt, and writes the rest.
        mode: Encoder and decoder at once, the encoder alone, or generation step by step.
        phases: Kinds of traffic, in order.
        per_phase: Number of held-out batches of each phase.
        warm: Number of batches at the start of each turn that are not counted.
        turns: Number of turns of each arm.
        arms: The arms to run.
        plain: Whether to run the unmodified model too, with all experts in memory.
        mbps: Limit of the read speed in MB/s, to find the speed at which prefetch stops paying.
        ranks: Number of processes, which communicate over gloo; each is a device.
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"unknown arms {', '.join(unknown)}; expected some of {', '.join(ARMS)}")
    if not 0 < budget <= 1 or warm >= per_phase * len(phases):
        raise ValueError(
            f"budget is {budget} and warm is {warm}; expected a budget above 0 and up to 1, "
            f"and warm below the number of batches ({per_phase * len(phases)})"
        )
    if ranks < 1 or sequences < ranks or (plain and ranks > 1):
        raise ValueError(f"ranks is {ranks}; expected 1 to the number of sequences ({sequences}), and 1 with --plain")
    if ranks > 1 and "RANK" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torchrun(["--standalone", "--nproc-per-node", str(ranks), "-m", "benchmarks.tiers", *sys.argv[1:]])
        return
    torch.set_num_threads(1)
    small = load_model(recorded)
    if small.layout.causal and mode == "encoder":
        raise ValueError(f"mode is encoder, and {recorded} has none; expected full or generate")
    batching = BatchingConfig(batches=40, smallest=sequences, largest=sequences, length=length)
    with Ranks() as group:
        batches = record(small, batching, phases, per_phase, mode=mode)
        learned = record(small, batching, SEEN, TRAINING, "train", "generate") if "ours" in arms else []
        bench = Bench(model, batches, learned, small, predictor, mode, group)
        kept: dict[str, list[Turn]] = {arm: [] for arm in (["plain"] if plain else []) + list(arms)}
        speed = read_speed(ThrottledFiles(bench.stored, bench.layout, torch.float32))
        for number in track(range(turns), "turns", console=Console(stderr=True, quiet=group.rank > 0)):
            for arm in np.roll(list(kept), -number):
                kept[arm].append(bench.plain(model, warm) if arm == "plain" else bench.turn(arm, budget, warm, mbps))
    if group.rank > 0:
        return
    results = {arm: summarise(done) for arm, done in kept.items()}
    needed = [needed_LE.sum() for batch in bench.batches[warm:] for needed_LE in batch.passes(bench.layout, mode)]
    setting = {
        "budget": budget, "sequences": sequences, "length": length, "mode": mode, "batches": len(bench.batches) - warm,
        "turns": turns, "expert_bytes": 4 * sum(map(prod, bench.stored.format.shapes)), "mbps_limit": mbps,
        "ranks": ranks, "needed_per_pass": float(np.mean(needed)),
        "forecast_ms": float(np.median(bench.forecast_ms)) if bench.forecast_ms else None, **speed,
    }  # fmt: skip
    limited = f" limited to {mbps:.0f}" if mbps else ""
    title = f"{mode}, {sequences} x {length} tokens, budget {budget:.0%}, disk {speed['read_mbps']:.0f} MB/s{limited}"
    console = Console(width=None if sys.stdout.isatty() else 150)
    show(results, title if ranks == 1 else f"{title}, {ranks} ranks", console)
    console.print(setting)
    print_json({**results, "setting": setting})


if __name__ == "__main__":
    with user_errors():
        from_command_line(tiers)
