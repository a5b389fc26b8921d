"""Step time of one MoE layer over several ranks under skewed loads: contiguous, EPLB, ours, oracle, perfect balance.

    python -m benchmarks.expert_parallel                               # 2 gloo ranks of one thread each
    torchrun --nproc-per-node 8 -m benchmarks.expert_parallel --experts 64 --redundant 16 --dtype bfloat16    # 8 GPUs
    python -m benchmarks.expert_parallel --loads counts.npz --experts 64
    python -m benchmarks.expert_parallel --emulate 8                   # one process computes 8 devices' work in turn
    python -m benchmarks.expert_parallel --top-k 8 --experts 64        # gated experts, eight a token, as in OLMoE

Kernels and network are real, routing is injected: the tokens of each step go to experts as a recorded or Zipf load
prescribes. All arms run in turn within each step, with the same tokens. Our arms forecast, plan and copy weights during
the step before, as in the engine; EPLB's plans and copies cost nothing. Prints a table; in a pipe, a line of JSON.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.distributed.run import main as torchrun

from benchmarks.support.injected import Stream, Upcoming, recorded, zipf
from data.arrays import FloatArray, IntArray
from data.cli import print_json, user_errors
from data.models.expert import ExpertFormat
from predictor.baselines.history import Ema
from predictor.forecast import forecast_from_load
from runtime.balancing.eplb import EplbPlanner
from runtime.balancing.plan import ReplicationPlan, contiguous_homes, flat_homes
from runtime.balancing.planner import HomePlanner
from runtime.balancing.split import balancedness, split_evenly
from runtime.distributed.ranks import Ranks
from runtime.engine.controller import Controller
from runtime.experts.grouped_mm import ExpertFunction, measure_overhead
from runtime.experts.layer import ReplicatedExperts
from runtime.experts.slots import ResidentSlots
from runtime.experts.transfer import WeightTransfer

D_MODEL, D_FF = 768, 3072
GATED = 1024
"""Inner width of gated experts, OLMoE's and half of its model width."""
WARM = 4
"""Steps that run but are not counted, while the history fills and kernels compile."""


class Arm:
    """One way to place experts and to split tokens.

    Args:
        name: Its name in tables.
        experts: The layer that runs it; arms that copy weights need one of their own.
        home: The plan without replicas.
        ranks: The ranks.
        forecaster: Forecasts the loads that plans are made from; None changes no plan.
    """

    def __init__(
        self, name: str, experts: ReplicatedExperts, home: ReplicationPlan, ranks: Ranks, forecaster: Any = None
    ) -> None:
        self.name, self.experts, self.ranks, self.forecaster = name, experts, ranks, forecaster
        self.plan: IntArray = home.phy2log[0]
        self.even = False
        self.steps: list[dict[str, Any]] = []
        if forecaster is not None:
            assert isinstance(experts.slots, ResidentSlots)
            transfer = WeightTransfer([experts.slots], home, ranks)
            price = experts.expert_overhead_tokens
            planner = HomePlanner(home.num_devices, home.num_redundant_experts, expert_overhead_tokens=price)
            self.controller = Controller(forecaster, planner, transfer, ranks)

    def run(self, step: int, hidden: torch.Tensor, one_hot: torch.Tensor, weight: torch.Tensor) -> None:
        """Runs a step and records its times and loads."""
        experts, exposed = self.experts, 0.0
        if self.ranks.world > 1:
            dist.barrier()
        began = time.perf_counter()
        prepared = None
        if self.forecaster is not None:
            prepared = self.controller.commit(wait=step == 0)
            exposed = time.perf_counter() - began
            self.plan = self.controller.transfer.plan.phy2log[0]
        experts.begin(self.plan, None)
        spent: list[float] = []
        experts.split = self._timed_split(spent)  # type: ignore[assignment, method-assign]
        if self.forecaster is not None:
            self.controller.prepare(None)
        experts.compute(hidden, one_hot, weight, training=False)
        if hidden.is_cuda:
            torch.cuda.synchronize(hidden.device)
        elapsed = 1e3 * (time.perf_counter() - began)
        busy = experts.slots.take_busy_ms()
        if self.forecaster is not None:
            self.controller.observe(experts.counters.load[None])
        self.steps.append({
            "step_ms": elapsed, "busy_ms": busy, "load": experts.counters.device_load.copy(),
            "exposed_ms": 1e3 * exposed, "split_ms": sum(spent), "waited_ms": experts.waited.take_ms(),
            "prepare_ms": prepared.forecast_ms + prepared.plan_ms if prepared else 0.0,
            "move_ms": prepared.move_ms if prepared else 0.0, "moves": prepared.moves if prepared else 0,
        })  # fmt: skip

    def _timed_split(self, spent: list[float]) -> Callable[[IntArray], IntArray]:
        def split(counts: IntArray) -> IntArray:
            began = time.perf_counter()
            if self.even:
                quota = split_evenly(counts, self.experts.phy2log, self.experts.num_devices)
            else:
                quota = ReplicatedExperts.split(self.experts, counts)
            spent.append(1e3 * (time.perf_counter() - began))
            return quota

        return split


def swiglu(rows: torch.Tensor) -> torch.Tensor:
    """The gate of Mixtral, Qwen3-MoE and OLMoE: `[M, 2F]` becomes `[M, F]`."""
    gate, up = rows.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def function_of(top_k: int) -> ExpertFunction:
    """Switch's experts for one a token, gated ones for several."""
    if top_k == 1:
        return ExpertFunction(ExpertFormat.plain(D_FF, D_MODEL), torch.nn.ReLU())
    shapes = (2 * GATED, D_MODEL), (D_MODEL, GATED)
    return ExpertFunction(ExpertFormat(("gate_up_proj", "down_proj"), shapes, gated=True), swiglu)


def layer(
    home: ReplicationPlan, ranks: Ranks, like: torch.Tensor, top_k: int, overhead: int | str = 0
) -> ReplicatedExperts:
    """A layer with random weights on this rank's devices, in the dtype of `like` and where it lies."""
    own = home.num_devices // ranks.world
    devices = range(ranks.rank * own, (ranks.rank + 1) * own)
    function = function_of(top_k)
    weights = ResidentSlots(home, 0, devices, function, like, ranks.world > 1)
    generator = torch.Generator(like.device).manual_seed(ranks.rank)
    weights.tensors[0].normal_(std=D_MODEL**-0.5, generator=generator)
    weights.tensors[1].normal_(std=D_FF**-0.5, generator=generator)
    price = measure_overhead(weights.experts[0], ranks) if overhead == "auto" else int(overhead)
    return ReplicatedExperts(weights, home.phy2log[0], ranks, home.num_devices, expert_overhead_tokens=price)


def arms_of(stream: Stream, home: ReplicationPlan, ranks: Ranks, like: torch.Tensor, overhead: int | str) -> list[Arm]:
    """All arms. Our homes are balanced over the uncounted steps. Arms that never copy weights share one layer.

    With an overhead, "history" runs a second time right after itself, under a split that counts the overhead.
    """
    flat = flat_homes(stream.loads[:WARM].mean(0, keepdims=True), home.num_devices)
    ours = ReplicationPlan.at_home(flat, home.num_devices, home.num_redundant_experts)
    top_k = stream.top_k
    shared = layer(home, ranks, like, top_k)
    eplb = Arm("eplb", shared, home, ranks)
    eplb.even = True
    priced = []
    if overhead != 0:
        experts = layer(ours, ranks, like, top_k, overhead)
        priced = [Arm(f"history, price {experts.expert_overhead_tokens}", experts, ours, ranks, Ema())]
    return [
        Arm("contiguous", shared, home, ranks),
        eplb,
        Arm("history", layer(ours, ranks, like, top_k), ours, ranks, Ema()),
        *priced,
        Arm("oracle", layer(ours, ranks, like, top_k), ours, ranks, Upcoming()),
        Arm("perfect", shared, home, ranks),
    ]


@torch.inference_mode()
def measure(
    stream: Stream, home: ReplicationPlan, ranks: Ranks, like: torch.Tensor, overhead: int | str
) -> dict[str, Any]:
    """Runs all arms over all steps, in turn within each; `like` has the dtype and device of tokens and weights."""
    arms = arms_of(stream, home, ranks, like, overhead)
    console = Console(stderr=True, quiet=ranks.rank > 0)
    torch.manual_seed(ranks.rank)
    for step in track(range(len(stream.loads)), "steps", console=console):
        for arm in arms:
            one_hot = stream.routed(step, ranks.rank, arm.name == "perfect", home.num_devices).to(like.device)
            weight = torch.rand(len(one_hot), stream.top_k).to(like)
            hidden = torch.randn(len(one_hot), D_MODEL).to(like)
            if arm.name == "eplb" and step:
                last = forecast_from_load(stream.loads[step - 1][None].astype(np.float64), made_at=step, source="last")
                arm.plan = EplbPlanner().plan(last, home, np.zeros((0, 1, home.num_experts), dtype=np.int64)).phy2log[0]
            if isinstance(arm.forecaster, Upcoming):
                arm.forecaster.load = stream.loads[min(step + 1, len(stream.loads) - 1)]
            arm.run(step, hidden, one_hot, weight)
    times = {arm.name: step_times(arm, ranks) for arm in arms}
    found = {arm.name: summary(arm, *times[arm.name]) for arm in arms}
    for name in found:
        if name.startswith("history, price"):
            over = times[name][0] / times["history"][0]
            found[name]["over_history"] = np.quantile(over, [0.25, 0.5, 0.75]).round(3).tolist()
    return found


def step_times(arm: Arm, ranks: Ranks) -> tuple[FloatArray, FloatArray]:
    """Milliseconds of the counted steps and, of each, those that devices were busy; the slowest makes the step."""
    kept = arm.steps[WARM:]
    own = torch.tensor([[row["step_ms"], row["waited_ms"], *row["busy_ms"]] for row in kept], dtype=torch.float64)
    rows = ranks.gather(own).numpy()  # [S, steps, 2 + devices of a rank]
    busy = np.concatenate(rows[:, :, 2:], axis=-1)
    emulated = ranks.world == 1 and busy.shape[-1] > 1
    return busy.max(-1) if emulated else rows[:, :, 0].max(0), busy


def summary(arm: Arm, step: FloatArray, busy: FloatArray) -> dict[str, Any]:
    """Medians over the counted steps."""
    kept = arm.steps[WARM:]
    low, middle, high = np.quantile(step, [0.25, 0.5, 0.75])
    return {
        "step_ms": round(float(middle), 2),
        "spread_ms": [round(float(low), 2), round(float(high), 2)],
        "busy_ms": np.median(busy, axis=0).round(2).tolist(),
        "balancedness": round(float(np.mean([balancedness(row["load"][None])[0] for row in kept])), 4),
        "moves": round(float(np.mean([row["moves"] for row in kept])), 2),
        **{name: round(median(row[name] for row in kept), 3)
           for name in ("split_ms", "prepare_ms", "move_ms", "exposed_ms", "waited_ms")},
    }  # fmt: skip


def show(found: dict[str, Any], title: str) -> None:
    """Prints the arms as a table: step times over that of perfect balance, and what a price for experts changes."""
    priced = any("over_history" in arm for arm in found.values())
    table = Table(title=title)
    for name in ("arm", "step ms", "quartiles", "x perfect", "busy ms", "balancedness", "moves", "split ms",
                 "forecast + plan ms", "exposed ms", *(["over history, step by step"] if priced else [])):  # fmt: skip
        table.add_column(name, justify="right")
    for name, arm in found.items():
        low, middle, high = arm.get("over_history", [1.0] * 3)
        over = f"{middle:.2f} ({low:.2f} - {high:.2f})" if "over_history" in arm else ""
        table.add_row(
            name, f"{arm['step_ms']:.0f}", " - ".join(f"{ms:.0f}" for ms in arm["spread_ms"]),
            f"{arm['step_ms'] / found['perfect']['step_ms']:.2f}", " ".join(f"{ms:.0f}" for ms in arm["busy_ms"]),
            f"{arm['balancedness']:.3f}", f"{arm['moves']:.1f}", f"{arm['split_ms']:.2f}", f"{arm['prepare_ms']:.1f}",
            f"{arm['exposed_ms']:.2f}", *([over] if priced else []),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def whole_or_auto(text: str) -> int | str:
    """Reads 'auto' or a whole number of at least 0."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"it is {text}, expected 0 or more, or 'auto'")
    return text if text == "auto" else int(text)


def parse() -> argparse.Namespace:
    """Reads the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--loads", type=Path, help="trace folder or counts file; Zipf loads by default")
    parser.add_argument("--layer", type=int, default=0, help="which layer of --loads")
    parser.add_argument("--experts", type=int, default=32, help="experts of the Zipf loads")
    parser.add_argument("--exponent", type=float, default=1.2, help="of the Zipf loads")
    parser.add_argument("--redundant", type=int, default=8, help="replica slots over all ranks")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a step over all ranks")
    parser.add_argument("--top-k", type=int, default=1, help="experts of a token; with several, experts are gated")
    parser.add_argument("--steps", type=int, default=34)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of tokens and weights")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--expert-overhead-tokens", type=whole_or_auto, default=0, metavar="N|auto",
        help="also run history with a split that counts N tokens for an active expert; auto measures N",
    )  # fmt: skip
    parser.add_argument("--emulate", type=int, default=0, metavar="DEVICES", help="emulated by one process")
    return parser.parse_args()


def main() -> None:
    """Starts the ranks, unless torchrun has started them, and prints rank 0's results."""
    options = parse()
    if not options.emulate and "RANK" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torchrun(["--standalone", "--nproc-per-node", str(options.ranks), "-m", __spec__.name, *sys.argv[1:]])
        return
    torch.set_num_threads(1)
    with user_errors(), Ranks() as ranks:
        if options.loads is None:
            loads = zipf(options.experts, options.tokens * options.top_k, options.steps, options.exponent)
        else:
            loads = recorded(options.loads, options.layer, options.tokens * options.top_k, options.steps)
        if len(loads) <= WARM:
            raise ValueError(f"{len(loads)} steps; expected more than {WARM}, because the first {WARM} are not counted")
        devices = options.emulate or ranks.world
        home = ReplicationPlan.at_home(contiguous_homes(1, loads.shape[1]), devices, options.redundant)
        like = torch.empty(1, dtype=getattr(torch, options.dtype), device=ranks.device)
        stream = Stream(loads, ranks.world, options.top_k)
        found = measure(stream, home, ranks, like, options.expert_overhead_tokens)
        if ranks.rank == 0:
            kind = "GPUs" if like.is_cuda else "gloo ranks, a thread each"
            where = f"{devices} {'emulated devices' if options.emulate else kind}, {options.dtype}"
            show(
                found,
                f"{where}; {loads.shape[1]} experts, {options.top_k} a token, "
                f"{options.redundant} redundant, {options.tokens} tokens",
            )
            perfect = found["perfect"]["step_ms"]
            shares = {f"share_of_perfect_{name}": round(perfect / found[name]["step_ms"], 4) for name in
                      ("history", "oracle", "eplb", "contiguous")}  # fmt: skip
            document = {"share_of_perfect": shares["share_of_perfect_history"], **shares}
            document["speedup_over_contiguous"] = round(found["contiguous"]["step_ms"] / found["history"]["step_ms"], 3)
            document["settings"] = {name: str(value) for name, value in vars(options).items()} | {
                "torch": torch.__version__, "ranks": ranks.world, "seed": 0}  # fmt: skip
            print_json(found | document)


if __name__ == "__main__":
    main()
