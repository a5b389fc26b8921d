"""Experts that do not fit: policies side by side under one byte budget, on recorded routing and real reads.

    python -m benchmarks.support.make_switch --out outputs/switch-base-64 --experts 64 --blocks 4 --capacity 16
    python -m benchmarks.tiers --model outputs/switch-base-64 --predictor outputs/predictor
    python -m benchmarks.tiers --model outputs/switch-base-64 --predictor outputs/predictor --ranks 2

Weights are random, of switch-base's geometry, on disk, and read past the page cache. Which experts are needed is what
the bundled model's routers did with real text. Arms take turns; each turn starts from an empty cache and its first
batches are not counted. On several ranks each has its share of the sequences, of the experts, and of the budget. Prints
tables and, as the last line, one JSON document with the figures of every arm.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch.distributed.run import main as torchrun

from benchmarks.support.machine import ResidentPeak, ThrottledFiles, read_speed, touch
from benchmarks.support.recorded import Mode, RecordedBatch, RecordedRouter, play_back, record
from benchmarks.support.turns import Turn, over_ranks, show, summarise
from data.cli import from_command_line, user_errors
from data.models.layout import MoELayout
from data.models.switch import LoadedSwitch, load_dense, load_switch
from data.models.weights import BUNDLED, ModelWeights
from data.text.batching import BatchingConfig
from predictor.baselines.history import Ema
from predictor.checkpoint import load_predictor
from predictor.forecast import Forecaster, forecast_from_load
from runtime.distributed.ranks import Ranks
from runtime.engine.batch import ModelBatch, forward, needed_positions
from runtime.experts.layer import ReplicatedExperts
from runtime.offload.cache import LOADERS, ExpertCache
from runtime.offload.expert_files import ExpertFiles
from runtime.offload.forecast_policy import ForecastPolicy, LruFallback
from runtime.offload.memory import PAGE
from runtime.offload.policy import CosinePolicy, LastBatchPolicy, LfuPolicy, LruPolicy, OraclePolicy, Policy
from runtime.offload.slots import install
from runtime.offload.stats import CacheStats

ARMS = ("all_resident", "lru", "lfu", "last", "cosine", "ours_history", "ours", "oracle")


class Bench:
    """The model, the recording, and what every turn shares."""

    def __init__(
        self, model: str, batches: list[RecordedBatch], small: LoadedSwitch, predictor: Path | None, mode: Mode,
        ranks: Ranks,
    ) -> None:  # fmt: skip
        self.model, self.batches, self.mode, self.ranks = load_dense(model), batches, mode, ranks
        self.files = ModelWeights(model).files
        touch(self.model.model)
        self.layout: MoELayout = self.model.layout
        wanted = [small.layout.num_layers, small.layout.num_encoder_layers, small.layout.num_experts]
        if [self.layout.num_layers, self.layout.num_encoder_layers, self.layout.num_experts] != wanted:
            raise ValueError(
                f"{model} has another number of layers or experts than the recording: {wanted}; see --help"
            )
        self.routers: list[RecordedRouter] = play_back(self.model.model, self.layout)
        experts = self.layout.num_experts
        self.own = np.arange(experts) * ranks.world // experts == ranks.rank
        self.forecaster: Forecaster | None = None
        if predictor is not None:
            self.forecaster = load_predictor(predictor, small.layout, small.model.shared.weight.detach().float())
        self.loads = np.stack([batch.load(self.layout) for batch in batches])
        self.forecast_ms: list[float] = []

    def policy(self, arm: str, places: int) -> Policy:
        """A fresh policy for an arm."""
        shape = (self.layout.num_layers, self.layout.num_experts)
        if arm == "oracle":
            passes = [one for batch in self.batches for one in batch.passes(self.layout, self.mode)]
            return OraclePolicy(np.stack(passes) & self.own)
        if arm.startswith("ours"):
            return LruFallback(ForecastPolicy(*shape), *shape, places)
        kinds = {"all_resident": LruPolicy, "lru": LruPolicy, "lfu": LfuPolicy, "last": LastBatchPolicy}
        return kinds.get(arm, CosinePolicy)(*shape)

    def turn(self, arm: str, budget: float, warm: int, mbps: float | None = None) -> Turn:
        """Runs all batches through one arm."""
        files = ThrottledFiles(self.files, self.layout, torch.float32, mbps=mbps)
        places = int((1.0 if arm == "all_resident" else budget) * len(files) / self.ranks.world)
        held = places * 2 * files.shape.room + LOADERS * files.reader_bytes + PAGE
        turn, policy = Turn(), self.policy(arm, places)
        with ResidentPeak() as peak, ExpertCache(files, policy, held) as cache, ThreadPoolExecutor(1) as aside:
            layers = install(self.model.model, self.layout, cache, self.ranks)
            if arm == "all_resident":
                for layer in range(self.layout.num_layers):
                    list(cache.use(layer, np.flatnonzero(self.own).tolist()))
            before = CacheStats()
            ready = aside.submit(self._foresee, arm, cache, 0)
            for number, batch in enumerate(self.batches):
                if number == warm:
                    before = cache.tiers[0].stats.copy()
                began = time.perf_counter()
                ready.result()
                cache.begin()
                if number + 1 < len(self.batches):
                    ready = aside.submit(self._foresee, arm, cache, number + 1)
                self.run(batch, layers)
                if number >= warm:
                    turn.seconds.append(time.perf_counter() - began)
                    turn.tokens.append(self.tokens(batch))
            turn.stats = over_ranks(cache.tiers[0].stats.since(before), self.ranks)
        turn.resident_peak = int(self.ranks.gather(torch.tensor(peak.grown)).sum())
        turn.fallbacks = getattr(policy, "fallbacks", 0)
        return turn

    def _foresee(self, arm: str, cache: ExpertCache, number: int) -> None:
        """Forecasts a batch, as a controller would while the one before it runs."""
        forecaster = {"ours": self.forecaster, "ours_history": Ema(0.5)}.get(arm)
        if forecaster is None or (arm == "ours_history" and number == 0):
            return
        began = time.perf_counter()
        forecast = forecaster.forecast(self.batches[number].tokens, self.loads[: max(number - 1, 0)])
        self.forecast_ms.append(1e3 * (time.perf_counter() - began))
        cache.expect(forecast_from_load(forecast.load * self.own, made_at=number, source=forecast.source))

    def tokens(self, batch: RecordedBatch) -> int:
        """Real tokens that the model runs."""
        return batch.tokens.num_tokens + (0 if self.mode == "encoder" else batch.decoder.num_tokens)

    @torch.inference_mode()
    def run(self, batch: RecordedBatch, layers: list[ReplicatedExperts] | None) -> None:
        """This rank's sequences of a batch through the model, with the experts that are installed."""
        batch = batch.part(ModelBatch(batch.tokens).rows(self.ranks.rank, self.ranks.world))
        for layer, router in enumerate(self.routers):
            decoding = layer >= self.layout.num_encoder_layers
            router.batch, router.step = batch, 0 if decoding and self.mode == "generate" else None
            if layers is not None:
                stepwise = router.step is not None
                layers[layer].begin_step(
                    None if stepwise else needed_positions(batch.mask(layer, self.layout)).reshape(-1)
                )
        if self.mode == "generate":
            steps = batch.decoder.input_ids.shape[1]
            self.model.model.generate(
                input_ids=batch.tokens.input_ids, attention_mask=batch.tokens.mask.long(),
                max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
            )  # fmt: skip
        else:
            forward(self.model.model, ModelBatch(batch.tokens, batch.decoder if self.mode == "full" else None))

    def plain(self, model: str, warm: int) -> Turn:
        """The model's own experts modules, all in memory."""
        whole = load_switch(model).model
        for name in self.layout.module_names:
            self.model.model.set_submodule(f"{name}.experts", whole.get_submodule(f"{name}.experts"))
        turn = Turn()
        for number, batch in enumerate(self.batches):
            began = time.perf_counter()
            self.run(batch, None)
            if number >= warm:
                turn.seconds.append(time.perf_counter() - began)
                turn.tokens.append(self.tokens(batch))
        return turn


def tiers(
    model: str = "outputs/switch-base-64",
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
        model: A folder made by make_switch with the bundled model's layers and experts (4 blocks, 64).
        predictor: What train.py left for the bundled model; without it 'ours' has history alone.
        budget: Share of the bytes of all experts.
        sequences: Sequences of a batch.
        length: Most tokens of a sequence.
        mode: Encoder and decoder at once, the encoder alone, or generation step by step.
        phases: Kinds of traffic, in order.
        per_phase: Held-out batches of each.
        warm: Batches at the start of each turn that are not counted.
        turns: Turns of each arm.
        arms: Which arms.
        plain: Also the plain model with its own experts modules, all in memory.
        mbps: Slow reads down to so many MB/s; only to find where prefetch stops paying.
        ranks: Processes over gloo, a device each.
    """
    if not 0 < budget <= 1 or warm >= per_phase * len(phases):
        raise ValueError(f"budget {budget} must lie above 0 and up to 1, warm {warm} below the number of batches")
    if ranks < 1 or sequences < ranks or (plain and ranks > 1):
        raise ValueError(f"ranks is {ranks}; expected 1 or more, not above sequences ({sequences}), and 1 with --plain")
    if ranks > 1 and "RANK" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torchrun(["--standalone", "--nproc-per-node", str(ranks), "-m", "benchmarks.tiers", *sys.argv[1:]])
        return
    torch.set_num_threads(1)
    small, traffic = (
        load_switch(BUNDLED),
        BatchingConfig(batches=40, smallest=sequences, largest=sequences, length=length),
    )
    with Ranks() as ranks:
        bench = Bench(model, record(small, traffic, phases, per_phase), small, predictor, mode, ranks)
        kept: dict[str, list[Turn]] = {arm: [] for arm in (["plain"] if plain else []) + list(arms)}
        speed = read_speed(ExpertFiles(bench.files, bench.layout, torch.float32))
        for number in track(range(turns), "turns", console=Console(stderr=True, quiet=ranks.rank > 0)):
            for arm in np.roll(list(kept), -number):
                kept[arm].append(bench.plain(model, warm) if arm == "plain" else bench.turn(arm, budget, warm, mbps))
    if ranks.rank > 0:
        return
    results = {arm: summarise(done) for arm, done in kept.items()}
    needed = [one.sum() for batch in bench.batches[warm:] for one in batch.passes(bench.layout, mode)]
    setting = {
        "budget": budget, "sequences": sequences, "length": length, "mode": mode, "batches": len(bench.batches) - warm,
        "turns": turns, "expert_bytes": 2 * 4 * bench.layout.d_model * bench.layout.d_ff, "mbps_limit": mbps,
        "ranks": ranks, "needed_per_pass": float(np.mean(needed)),
        "forecast_ms": float(np.median(bench.forecast_ms)) if bench.forecast_ms else None, **speed,
    }  # fmt: skip
    held = f" held to {mbps:.0f}" if mbps else ""
    title = f"{mode}, {sequences} x {length} tokens, budget {budget:.0%}, disk {speed['read_mbps']:.0f} MB/s{held}"
    console = Console(width=None if sys.stdout.isatty() else 150)
    show(results, title if ranks == 1 else f"{title}, {ranks} ranks", console)
    console.print(setting)
    print(json.dumps({**results, "setting": setting}))


if __name__ == "__main__":
    with user_errors():
        from_command_line(tiers)
