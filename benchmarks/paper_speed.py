"""The paper's speed experiment on one MoE layer of switch-base geometry: ways to run experts, beside ours.

    python -m benchmarks.paper_speed                                  # 8, 64 and 128 experts
    python -m benchmarks.paper_speed --experts 8 64 128 256 --device cuda --dtype bfloat16

A batch is 64 sequences of 4 to 48 tokens, padded (the lengths of SST2 and MRPC, on which the paper measured); its
tokens go to experts by a Zipf load. Arms, all in turn on the same batches:

- `hugging face`: the model's own experts module, a loop over experts;
- `sorted loop`: tokens sorted by expert, one product for each expert that has some;
- `grouped_mm`: torch's grouped product on sorted tokens;
- `padded`: one batched product, every expert padded to the largest load;
- `padded, replicas`: the same with 16 slots more, in proportion to the true load, as in the paper; the copies of
  weights are made before and not timed;
- `switchcast`: our layer, which skips padding. Its plan has no replicas, because one device gains nothing by them.

On a GPU, calls are timed eight in a row, because the layers of a model follow each other without a wait; an arm whose
host waits for the GPU inside the layer pays for it.

Useful is the share of the rows multiplied that are real tokens. Busy is the share of the time that the processor spends
in matrix products, or that kernels run on a GPU, measured by torch's profiler on batches of its own. On a GPU the
profiler gives the kernels' time alone, because it slows launches; the time that it is divided by is measured without
it. Working memory is what a call allocates on a GPU beside weights and inputs, at most. Where a prediction
replaces the router (SiDA, the paper), speed is that of `sorted loop` and `padded, replicas` without the router's
product; what it loses is `benchmarks.paper_quality`. Prints a table for each number of experts and, in a pipe, one
line of JSON.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import grouped_mm, linear, one_hot
from torch.profiler import ProfilerActivity, profile
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts

from benchmarks.one_device import D_FF, D_MODEL, in_slots
from data.cli import print_json
from runtime.experts.slots import ResidentSlots

SEQUENCES, LENGTHS = 64, (4, 48)
REPLICAS = 16
CALLS = 8
"""Calls in a row that are timed together on a GPU."""
PROFILED = 3
"""Batches on which the profiler looks on."""
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm"}
"""Operations of torch on the CPU that are matrix products."""
ARMS = ("hugging face", "sorted loop", "grouped_mm", "padded", "padded, replicas", "switchcast")


@dataclass(frozen=True)
class Batch:
    """One layer's input.

    Attributes:
        hidden: Hidden states, `[N, D]`.
        expert: The expert of each token, `[N]`.
        real: False for padding, `[N]`.
        weight: Router probability, `[N, 1]`.
    """

    hidden: Tensor
    expert: Tensor
    real: Tensor
    weight: Tensor


Call = tuple[Callable[[], Tensor], int]
"""What computes a batch, and the rows that it multiplies."""


class Layer:
    """One MoE layer's weights, computed in every way.

    Args:
        experts: Number of experts.
        like: A tensor of the dtype and device.
    """

    def __init__(self, experts: int, like: Tensor) -> None:
        config = SwitchTransformersConfig(d_model=D_MODEL, d_ff=D_FF, num_experts=experts, dropout_rate=0.0)
        with like.device:  # a CPU takes long to draw the weights of 256 experts
            self.loop = SwitchTransformersExperts(config).to(like).eval()
        self.slots = in_slots(self.loop, experts, like)
        assert isinstance(self.slots.slots, ResidentSlots)
        weights = self.slots.slots.experts[0]
        self.wi_EDF, self.wo_EFD, self.experts = weights.wi_NDP, weights.wo_NFD, experts

    def calls(self, batch: Batch) -> dict[str, Call]:
        """Every arm on a batch."""
        counts = torch.bincount(batch.expert, minlength=self.experts)
        chosen, copies = one_hot(batch.expert, self.experts)[:, None], proportional(counts, self.experts + REPLICAS)
        each = torch.arange(self.experts, device=counts.device).repeat_interleave(copies)
        wi, wo = self.wi_EDF[each], self.wo_EFD[each]
        tokens, alone = len(batch.hidden), torch.ones_like(counts)
        self.slots.begin_step(~batch.real)
        return {
            "hugging face": (lambda: self.loop(batch.hidden, chosen, batch.weight), tokens),
            "sorted loop": (lambda: self.sorted_loop(batch), tokens),
            "grouped_mm": (lambda: self.grouped(batch), tokens),
            "padded": (lambda: padded(batch, self.wi_EDF, self.wo_EFD, alone), self.experts * int(counts.max())),
            "padded, replicas": (lambda: padded(batch, wi, wo, copies), len(each) * int((-(-counts // copies)).max())),
            "switchcast": (lambda: self.slots(batch.hidden, chosen, batch.weight), int(batch.real.sum())),
        }

    def sorted_loop(self, batch: Batch) -> Tensor:
        """One product for each expert with tokens."""
        order = batch.expert.argsort(stable=True)
        counts = torch.bincount(batch.expert, minlength=self.experts).tolist()
        parts = torch.split(batch.hidden[order], counts)
        made = [
            linear(linear(rows, self.wi_EDF[expert].T).relu(), self.wo_EFD[expert].T)
            for expert, rows in enumerate(parts)
            if len(rows)
        ]
        return torch.empty_like(batch.hidden).index_copy_(0, order, torch.cat(made)) * batch.weight

    def grouped(self, batch: Batch) -> Tensor:
        """Two grouped products."""
        order = batch.expert.argsort(stable=True)
        ends = torch.bincount(batch.expert, minlength=self.experts).cumsum(0).int()
        inner = grouped_mm(batch.hidden[order], self.wi_EDF, offs=ends).relu()
        made = grouped_mm(inner, self.wo_EFD, offs=ends)
        return torch.empty_like(batch.hidden).index_copy_(0, order, made) * batch.weight


def padded(batch: Batch, wi_SDF: Tensor, wo_SFD: Tensor, copies_E: Tensor) -> Tensor:
    """One batched product over slots, all padded to the largest; an expert's tokens are spread over its copies."""
    order = batch.expert.argsort(stable=True)
    expert, counts = batch.expert[order], torch.bincount(batch.expert, minlength=len(copies_E))
    place = torch.arange(len(expert), device=expert.device) - (counts.cumsum(0) - counts)[expert]
    slot, row = (copies_E.cumsum(0) - copies_E)[expert] + place % copies_E[expert], place // copies_E[expert]
    block = batch.hidden.new_zeros(len(wi_SDF), int(row.max()) + 1, D_MODEL)
    block[slot, row] = batch.hidden[order]
    made = torch.bmm(torch.bmm(block, wi_SDF).relu(), wo_SFD)
    return torch.empty_like(batch.hidden).index_copy_(0, order, made[slot, row]) * batch.weight


def proportional(counts_E: Tensor, slots: int) -> Tensor:
    """Copies of each expert: one, and each further one where the load of a copy is largest, `[E]`."""
    copies = torch.ones_like(counts_E)
    for _ in range(slots - len(counts_E)):
        copies[(counts_E / copies).argmax()] += 1
    return copies


def draw(rng: np.random.Generator, experts: int, like: Tensor) -> Batch:
    """A padded batch with a Zipf load."""
    lengths = rng.integers(LENGTHS[0], LENGTHS[1] + 1, SEQUENCES)
    real = torch.from_numpy((np.arange(lengths.max()) < lengths[:, None]).flatten())
    share = np.arange(1.0, experts + 1) ** -1.0
    expert = torch.from_numpy(rng.choice(experts, len(real), p=share / share.sum()))
    hidden, weight = torch.randn(len(real), D_MODEL), torch.rand(len(real), 1)
    return Batch(hidden.to(like), expert.to(like.device), real.to(like.device), weight.to(like))


def synchronise(like: Tensor) -> None:
    """Waits for the GPU, if the tensor is on one."""
    if like.is_cuda:
        torch.cuda.synchronize()


def timed(call: Callable[[], Tensor], like: Tensor) -> tuple[Tensor, float]:
    """A call's output, and its seconds; on a GPU the mean of several calls in a row."""
    calls = CALLS if like.is_cuda else 1
    synchronise(like)
    began = time.perf_counter()
    for _ in range(calls):
        output = call()
    synchronise(like)
    return output, (time.perf_counter() - began) / calls


def busy(call: Callable[[], Tensor], like: Tensor) -> float:
    """Share of a call's time in matrix products, or in kernels on a GPU."""
    return busy_gpu(call, like) if like.is_cuda else busy_processor(call)


def busy_processor(call: Callable[[], Tensor]) -> float:
    """Share of a call's time in matrix products."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        call()
        seconds = time.perf_counter() - began
    products = (event for event in profiler.key_averages() if event.key in PRODUCTS)
    return 1e-6 * sum(float(event.self_cpu_time_total) for event in products) / seconds


def busy_gpu(call: Callable[[], Tensor], like: Tensor) -> float:
    """Share of a call's time in which a kernel or a copy runs; slightly above 1 where the two calls differ."""
    _, seconds = timed(call, like)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        synchronise(like)
    kernels = (event for event in profiler.events() if event.device_type.name == "CUDA")
    return 1e-6 * sum(float(event.time_range.elapsed_us()) for event in kernels) / seconds


def working_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes that a call allocates on the GPU, at most."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


@torch.inference_mode()
def measure(experts: int, repeats: int, like: Tensor) -> dict[str, Any]:
    """All arms on the same batches; the first warms up, and on the last three the profiler looks on."""
    torch.manual_seed(0)
    layer, rng = Layer(experts, like), np.random.default_rng(0)
    columns = ("ms", "useful", "busy", "working")
    taken: dict[str, dict[str, list[float]]] = {name: {column: [] for column in columns} for name in ARMS}
    tokens, difference = [], 0.0
    for turn in track(range(1 + repeats + PROFILED), f"{experts} experts", console=Console(stderr=True)):
        batch = draw(rng, experts, like)
        calls = layer.calls(batch)
        outputs = {}
        for name in ARMS if turn % 2 else reversed(ARMS):
            call, rows = calls[name]
            if turn > repeats:
                taken[name]["busy"].append(busy(call, like))
                if like.is_cuda:
                    taken[name]["working"].append(working_bytes(call))
                continue
            outputs[name], seconds = timed(call, like)
            if turn:
                taken[name]["ms"].append(1e3 * seconds)
                taken[name]["useful"].append(int(batch.real.sum()) / rows)
        tokens.append(int(batch.real.sum()))
        difference = max([difference, *(largest_difference(outputs, name, batch) for name in outputs)])
    arms = {name: figures(taken[name], taken["hugging face"]["ms"], name, experts, like) for name in ARMS}
    return {"experts": experts, "tokens": round(median(tokens)), "largest_difference": difference, "arms": arms}


def largest_difference(outputs: dict[str, Tensor], name: str, batch: Batch) -> float:
    """Of an arm's output for real tokens from the model's own."""
    return float((outputs[name] - outputs["hugging face"])[batch.real].abs().max())


def figures(taken: dict[str, list[float]], rival: list[float], name: str, experts: int, like: Tensor) -> dict[str, Any]:
    """Medians, and the speed over the model's own, pair by pair, with quartiles."""
    low, middle, high = quantiles([theirs / ours for ours, theirs in zip(taken["ms"], rival, strict=True)], n=4)
    slots = experts + REPLICAS * (name == "padded, replicas")
    working = {"working_bytes": round(median(taken["working"]))} if taken["working"] else {}
    return {
        "ms": round(median(taken["ms"]), 3), "speed": round(middle, 3),
        "speed_quartiles": [round(low, 3), round(high, 3)], "useful": round(median(taken["useful"]), 3),
        "busy": round(median(taken["busy"]), 3), "weight_bytes": slots * 2 * D_MODEL * D_FF * like.itemsize,
        **working,
    }  # fmt: skip


def show(report: dict[str, Any], console: Console) -> None:
    """Prints one number of experts."""
    table = Table(
        title=f"{report['experts']} experts, {report['tokens']} real tokens a batch",
        caption=f"largest difference of an output from the model's own: {report['largest_difference']:.1e}",
    )
    for column in ("arm", "ms", "speed", "quartiles", "useful", "busy", "weights, GB", "working, GB"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, arm in report["arms"].items():
        spread = " - ".join(f"{value:.2f}" for value in arm["speed_quartiles"])
        memory = [f"{arm[part] / 1e9:.2f}" if part in arm else "-" for part in ("weight_bytes", "working_bytes")]
        table.add_row(
            name, f"{arm['ms']:.2f}", f"{arm['speed']:.2f}", spread, f"{arm['useful']:.0%}", f"{arm['busy']:.0%}",
            *memory,
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 128])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats is {options.repeats}, expected 2 or more")
    torch.set_num_threads(1)
    like = torch.empty(1, device=options.device, dtype=getattr(torch, options.dtype))
    reports = [measure(experts, options.repeats, like) for experts in options.experts]
    for report in reports:
        show(report, Console(width=None if sys.stdout.isatty() else 120))
    where = "one thread" if options.device == "cpu" else torch.cuda.get_device_name()
    print_json({"torch": torch.__version__, "device": where, "dtype": options.dtype, "seed": 0, "results": reports})


if __name__ == "__main__":
    main()
