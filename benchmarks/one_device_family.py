"""Overhead on a single device for gated experts with K experts a token, against transformers' own two ways.

    python -m benchmarks.one_device_family --top-k 8
    python -m benchmarks.one_device_family --top-k 4 --device cuda --dtype bfloat16

Qwen3-30B-A3B's experts (2,048 x 768), Zipf loads, one process without replicas. Three arms run in turn on the same
tokens: the loop over experts (`eager`), `grouped_mm` of transformers, and the slots. `padded` batches contain a quarter
of padding, which only the slots skip. Prints a table and, in a pipe, one line of JSON.
"""

import argparse
import sys
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.one_device import Layer, cells, milliseconds, ratios
from data.cli import print_json
from data.models.expert import ExpertFormat
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.distributed.ranks import Ranks
from runtime.experts.grouped_mm import ExpertFunction
from runtime.experts.layer import ReplicatedExperts
from runtime.experts.slots import ResidentSlots

D_MODEL, D_FF = 2048, 768
SIZES = (1, 4, 16, 64, 256, 1024, 4096)


def arms_of(experts: int, top_k: int, like: torch.Tensor) -> tuple[dict[str, Layer], ReplicatedExperts]:
    """The same weights in three ways of computing, and the layer of the slots."""
    config = Qwen3MoeConfig(
        hidden_size=D_MODEL, moe_intermediate_size=D_FF, num_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = "eager"
    module = Qwen3MoeExperts(config).to(like).eval()
    for parameter in module.parameters():
        parameter.data.normal_(std=0.02)
    stacks = [module.gate_up_proj.detach(), module.down_proj.detach()]
    form = ExpertFormat(("gate_up_proj", "down_proj"), tuple(tuple(stack.shape[1:]) for stack in stacks), gated=True)
    home = ReplicationPlan.at_home(contiguous_homes(1, experts), 1, 0)
    function = ExpertFunction(form, module._apply_gate)
    slots = ResidentSlots(home, 0, range(1), function, like, whole=stacks)
    layer = ReplicatedExperts(slots, home.phy2log[0], Ranks(device="cuda" if like.is_cuda else "cpu"), 1)
    grouped = partial(grouped_mm_experts_forward, module)
    return {"eager": module, "grouped": grouped, "slots": partial(layer.compute, training=False)}, layer


@torch.inference_mode()
def measure(experts: int, top_k: int, sizes: list[int], repeats: int, like: torch.Tensor) -> list[dict[str, Any]]:
    """Ratios of times, pair by pair, for every number of tokens, with and without padding."""
    torch.manual_seed(0)
    (arms, layer), results = arms_of(experts, top_k, like), []
    popularity = torch.arange(1.0, experts + 1).pow(-1).log()
    cases = [(size, padded) for size in sizes for padded in (False, True) if not padded or size >= 4]
    for size, padded in track(cases, "sizes", console=Console(stderr=True)):
        layer.begin_step(torch.arange(size, device=like.device) >= size * 3 // 4 if padded else None)
        times: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(repeats * (1 if size >= 256 else 5)):
            gumbel = -(-torch.rand(size, experts).clamp(min=1e-9).log()).log()
            index = (popularity + gumbel).topk(top_k).indices.to(like.device)
            weight = torch.rand(size, top_k).softmax(-1).to(like)
            inputs = torch.randn(size, D_MODEL).to(like), index, weight
            for name in list(arms) if turn % 2 else reversed(list(arms)):
                times[name].append(milliseconds(arms[name], inputs))
        row: dict[str, Any] = {"tokens": size, "padded": padded, "slots_ms": round(median(times["slots"]), 3)}
        results.append(row | ratios(times, "eager", "grouped"))
    return results


def main() -> None:
    """Prints a table, then one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    like = torch.empty(1, device=options.device, dtype=getattr(torch, options.dtype))
    results = measure(options.experts, options.top_k, options.sizes, options.repeats, like)
    where = "one thread" if options.device == "cpu" else f"{torch.cuda.get_device_name()}, {options.dtype}"
    table = Table(title=f"Time of the slots over transformers', {options.experts} experts, K {options.top_k}, {where}")
    for name in ("tokens", "padding", "slots ms", "over eager", "quartiles", "over grouped_mm", "quartiles "):
        table.add_column(name, justify="right")
    for row in results:
        padding = "1/4" if row["padded"] else "none"
        table.add_row(str(row["tokens"]), padding, f"{row['slots_ms']:.2f}", *cells(row, "eager", "grouped"))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    versions = {"torch": torch.__version__, "device": where, "seed": 0}
    print_json({"experts": options.experts, "top_k": options.top_k, **versions, "results": results})


if __name__ == "__main__":
    main()
