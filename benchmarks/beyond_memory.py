"""Generates text from a model that is larger than memory, under two budgets whose outputs must be identical.

    python -m benchmarks.support.make_switch --out outputs/switch-base-128 --experts 128     # 29 GB
    python -m benchmarks.beyond_memory --model outputs/switch-base-128

Weights are random, so the text is noise; reads, routing and memory use are real. In a pipe, the last line is JSON.
"""

import time
from contextlib import closing
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.support.machine import ResidentPeak, memory_bytes, resident_bytes, touch
from data.byte_sizes import show_bytes
from data.cli import from_command_line, print_json, user_errors
from data.models.model import LoadedModel, load_dense
from data.models.stored_experts import ExpertReader, stored_experts
from data.models.weights import ModelWeights
from data.traces.trace import TokenBatch
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.distributed.ranks import Ranks
from runtime.engine.model import ReplicatedModel
from runtime.offload.slots import MemoryBudget

PROMPTS = (
    "the experts of this model do not fit into memory , so they are fetched when they are needed",
    "a small batch touches a tenth of them",
    "what was needed a moment ago is often needed again",
    "the rest waits on disk",
)


def generate(switch: LoadedModel, tokens: TokenBatch, stored: ExpertReader, budget: str, new: int) -> dict[str, Any]:
    """Generates greedily under a budget, and measures time, memory and reads."""
    layout, before = switch.layout, resident_bytes()
    home = ReplicationPlan.at_home(contiguous_homes(layout.num_layers, layout.num_experts), 1, 0)
    with (
        ResidentPeak() as peak,
        closing(ReplicatedModel(switch, home, Ranks(), MemoryBudget(budget, None, stored))) as replicated,
        replicated.batch(tokens, None, tokens.mask.any(1), prepared=True, measure=False),
    ):
        assert replicated.cache is not None
        began = time.perf_counter()
        ids: Tensor = switch.model.generate(
            input_ids=tokens.input_ids, attention_mask=tokens.mask.long(), max_new_tokens=new, do_sample=False
        )
        seconds = time.perf_counter() - began
        stats, fallbacks = replicated.cache.tiers[0].stats, replicated.cache.report()["fallbacks"]
    return {
        "ids": ids.tolist(), "seconds": round(seconds, 2), "tokens_per_s": round(ids[:, 1:].numel() / seconds, 2),
        "budget": budget, "grown_bytes": peak.grown, "peak_bytes": stats.peak_bytes, "before_bytes": before,
        "read_bytes": stats.demand_bytes + stats.prefetch_bytes, "hit_rate": round(stats.hit_rate, 3),
        "prefetch_precision": round(stats.precision, 3), "stall_s": round(stats.stall_ms / 1e3, 2),
        "fallbacks": fallbacks,
    }  # fmt: skip


def beyond_memory(
    model: str = "outputs/switch-base-128", budgets: tuple[str, ...] = ("4GiB", "1GiB"), new: int = 32
) -> None:
    """Generates under each budget and compares the outputs.

    Args:
        model: Folder of the model.
        budgets: Memory budgets for experts.
        new: Number of tokens to generate for each prompt.
    """
    torch.set_num_threads(1)
    console, weights = Console(width=150), ModelWeights(model)
    whole = sum(path.stat().st_size for path in set(weights.files.values()))
    switch = load_dense(model)
    stored = stored_experts(weights, switch.model, switch.layout)
    touch(switch.model)
    tokens = TokenBatch.of(switch.tokenizer(list(PROMPTS), padding=True, return_tensors="pt"))
    results = []
    for budget in budgets:
        done = generate(switch, tokens, stored, budget, new)
        results.append(done)
        console.print(
            f"{show_bytes(whole)} of weights, {budget} for experts: {done['seconds']} s, process grew by "
            f"{show_bytes(done['grown_bytes'])} from {show_bytes(done['before_bytes'])}, read "
            f"{show_bytes(done['read_bytes'])}, hits {done['hit_rate']:.0%}"
        )
    console.print(switch.tokenizer.batch_decode(results[0]["ids"], skip_special_tokens=True)[0][:200])
    same = all(done["ids"] == results[0]["ids"] for done in results)
    short = [{name: value for name, value in done.items() if name != "ids"} for done in results]
    print_json({"weights_bytes": whole, "memory_bytes": memory_bytes(), "same_text": same, "runs": short})


if __name__ == "__main__":
    with user_errors():
        from_command_line(beyond_memory)
