"""Overhead on a single device: ReplicatedExperts against the model's own loop over experts and a bare grouped GEMM.

    python -m benchmarks.one_device
    python -m benchmarks.one_device --device cuda --dtype bfloat16

Switch-base geometry, Zipf loads, one process without replicas. Three arms run in turn on the same tokens: the model's
own experts module (`loop`), sorting and two `grouped_mm` (`grouped`), and `ReplicatedExperts` (`slots`). `padded`
batches contain a quarter of padding, which only the slots skip. Prints a table and, in a pipe, one line of JSON.
"""

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.functional import grouped_mm
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts

from data.cli import print_json
from data.models.expert import ExpertFormat
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.distributed.ranks import Ranks
from runtime.experts.grouped_mm import ExpertFunction
from runtime.experts.layer import ReplicatedExperts
from runtime.experts.slots import ResidentSlots

D_MODEL, D_FF = 768, 3072
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def in_slots(loop: SwitchTransformersExperts, experts: int, like: torch.Tensor) -> ReplicatedExperts:
    """The loop's experts in the slots of one device, of a tensor's device and dtype."""
    home = ReplicationPlan.at_home(contiguous_homes(1, experts), 1, 0)
    function = ExpertFunction(ExpertFormat.plain(D_FF, D_MODEL), torch.nn.ReLU())
    weights = ResidentSlots(home, 0, range(1), function, like)
    for slot, expert in enumerate(loop.children()):
        for parameter, stacked in zip((expert.wi.weight, expert.wo.weight), weights.tensors, strict=True):
            stacked[slot].copy_(parameter)
            parameter.data = stacked[slot]
    return ReplicatedExperts(weights, home.phy2log[0], Ranks(device="cuda" if like.is_cuda else "cpu"), 1)


def grouped(slots: ReplicatedExperts) -> Layer:
    """Two grouped GEMMs over the same weights, with sorting and scattering."""
    assert isinstance(slots.slots, ResidentSlots)
    weights = slots.slots.experts[0]

    def layer(hidden: torch.Tensor, one_hot: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        order = one_hot[:, 0].argmax(-1).argsort(stable=True)
        offsets = one_hot.sum((0, 1)).cumsum(0).int()
        inner = grouped_mm(hidden[order], weights.wi_NDP, offs=offsets).relu()
        outer = grouped_mm(inner, weights.wo_NFD, offs=offsets) * weight[order]
        return torch.empty_like(hidden).index_copy_(0, order, outer)

    return layer


def milliseconds(layer: Layer, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
    """Time of one call; of short calls the best of four, so that the order of the arms matters little."""
    times = []
    for _ in range(1 if inputs[0].is_cpu and len(inputs[0]) >= 512 else 4):
        began = time.perf_counter()
        layer(*inputs)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return min(times)


@torch.inference_mode()
def measure(experts: int, repeats: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Ratios of times, pair by pair, for every size, with and without padding."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(d_model=D_MODEL, d_ff=D_FF, num_experts=experts, dropout_rate=0.0)
    loop = SwitchTransformersExperts(config).to(device, dtype).eval()
    slots = in_slots(loop, experts, torch.empty(1, device=device, dtype=dtype))
    arms: dict[str, Layer] = {"loop": loop, "grouped": grouped(slots), "slots": slots}
    share = np.arange(1.0, experts + 1) ** -1.0
    rng, results = np.random.default_rng(0), []
    cases = [(size, padded) for size in SIZES for padded in (False, True) if not padded or size >= 4]
    for size, padded in track(cases, "sizes", console=Console(stderr=True)):
        slots.begin_step(torch.arange(size, device=device) >= size * 3 // 4 if padded else None)
        times: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(repeats * (1 if size >= 512 else 5 if size >= 16 else 40)):  # short calls are noisier
            expert = torch.from_numpy(rng.choice(experts, size, p=share / share.sum()))
            one_hot = torch.nn.functional.one_hot(expert, experts)[:, None].to(device)
            inputs = (
                torch.randn(size, D_MODEL, dtype=dtype).to(device), one_hot, torch.rand(size, 1, dtype=dtype).to(device)
            )  # fmt: skip
            for name in list(arms) if turn % 2 else reversed(list(arms)):
                times[name].append(milliseconds(arms[name], inputs))
        row: dict[str, Any] = {"tokens": size, "padded": padded, "slots_ms": round(median(times["slots"]), 3)}
        results.append(row | ratios(times, "loop", "grouped"))
    return results


def ratios(times: dict[str, list[float]], *rivals: str) -> dict[str, Any]:
    """Median and quartiles of the slots' times over each rival's, pair by pair."""
    found: dict[str, Any] = {}
    for rival in rivals:
        pairs = [ours / theirs for ours, theirs in zip(times["slots"], times[rival], strict=True)]
        low, middle, high = quantiles(pairs, n=4)
        found[f"over_{rival}"], found[f"over_{rival}_quartiles"] = round(middle, 3), [round(low, 3), round(high, 3)]
    return found


def cells(row: dict[str, Any], *rivals: str) -> list[str]:
    """A table's cells of `ratios`."""
    spans = {rival: " - ".join(f"{ratio:.2f}" for ratio in row[f"over_{rival}_quartiles"]) for rival in rivals}
    return [cell for rival in rivals for cell in (f"{row[f'over_{rival}']:.2f}", spans[rival])]


def main() -> None:
    """Prints a table, then one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(options.experts, options.repeats, options.device, getattr(torch, options.dtype))
    where = "one thread" if options.device == "cpu" else f"{torch.cuda.get_device_name()}, {options.dtype}"
    table = Table(title=f"Time of the slots over that of the rivals, {options.experts} experts, {where}")
    for name in ("tokens", "padding", "slots ms", "over the loop", "quartiles", "over grouped_mm", "quartiles "):
        table.add_column(name, justify="right")
    for row in results:
        table.add_row(
            str(row["tokens"]), "1/4" if row["padded"] else "none", f"{row['slots_ms']:.2f}",
            *cells(row, "loop", "grouped"),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    versions = {"torch": torch.__version__, "device": where, "seed": 0}
    print_json({"experts": options.experts, **versions, "results": results})


if __name__ == "__main__":
    main()
