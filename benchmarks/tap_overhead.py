"""Overhead of the router tap: time of the same batches with and without it, measured alternately.

Run it with `python -m benchmarks.tap_overhead`; in a pipe, the last line of stdout is JSON. `--model random-qwen3`
measures a random decoder-only model of the bundled model's size instead: 64 experts, 4 of them a token.
"""

import os
import platform
import statistics
import time
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from data.cli import from_command_line, print_json, user_errors
from data.models.model import LoadedModel, load_model
from data.models.weights import BUNDLED
from data.text.batching import BatchingConfig
from data.text.corpus_stream import open_stream
from data.traces.router_tap import RouterTap
from data.traces.trace import pad_tokens
from data.traces.tracer import model_inputs

Inputs = list[dict[str, Tensor]]
RANDOM = "random-qwen3"


@torch.inference_mode()
def milliseconds(loaded: LoadedModel, batches: Inputs, tap: RouterTap | None) -> float:
    """Milliseconds of one pass over the batches; a tap is emptied after each batch, as `data.collect` does."""
    start = time.perf_counter()
    for batch in batches:
        loaded.model(**batch)
        if tap is not None:
            tap.take()
    return 1e3 * (time.perf_counter() - start)


def random_qwen3() -> LoadedModel:
    """A decoder-only model with random weights: 4 layers of width 256, 4 of 64 experts a token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192, hidden_size=256, moe_intermediate_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=64, num_experts=64, num_experts_per_tok=4,
    )  # fmt: skip
    model: Any = Qwen3MoeForCausalLM(config).eval()
    model.set_experts_implementation("grouped_mm")
    return LoadedModel.of(model)


def text_batches(loaded: LoadedModel, batches: int) -> Inputs:
    """Batches of 16 sequences of the offline corpus; random tokens for a model without a tokenizer."""
    if loaded.tokenizer is None:
        ids = torch.randint(loaded.layout.vocab_size, (batches, 16, 128), generator=torch.Generator().manual_seed(0))
        return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    batching = BatchingConfig(smallest=16, largest=16)
    stream = islice(open_stream(None, loaded.tokenizer, "teacher", batching, loaded.layout.causal), batches)
    if loaded.layout.causal:
        rows = [pad_tokens(batch.sources, 0) for batch in stream]
        return [{"input_ids": row.input_ids, "attention_mask": row.mask.long()} for row in rows]
    pairs = [model_inputs(batch, loaded.model.config) for batch in stream]
    return [
        {"input_ids": one.input_ids, "attention_mask": one.mask.long(), "decoder_input_ids": decoder.input_ids}
        for one, decoder in pairs
    ]


def tap_overhead(model: str = BUNDLED, repeats: int = 10, batches: int = 4) -> dict[str, object]:
    """Measures the overhead of the tap as the median over pairs of measurements, one with and one without it.

    Args:
        model: 'switch-mini-64' (bundled), 'random-qwen3' (decoder-only), a local folder, or a hub id.
        repeats: Number of pairs.
        batches: Batches of 16 sequences in one measurement.
    """
    loaded = random_qwen3() if model == RANDOM else load_model(model)
    inputs = text_batches(loaded, batches)
    milliseconds(loaded, inputs, None)  # warm-up
    ratios, plain_ms = [], []
    for turn in track(range(repeats), "pairs", console=Console(stderr=True)):
        with RouterTap(loaded.model, loaded.layout) as tap:
            tapped = milliseconds(loaded, inputs, tap) if turn % 2 else None
        plain = milliseconds(loaded, inputs, None)
        with RouterTap(loaded.model, loaded.layout) as tap:
            tapped = tapped or milliseconds(loaded, inputs, tap)
        ratios.append(tapped / plain)
        plain_ms.append(plain)
    spread = statistics.quantiles(ratios, n=4)
    return {
        "model": loaded.layout.model_id, "overhead": statistics.median(ratios) - 1,
        "quartiles": [spread[0] - 1, spread[2] - 1], "plain_ms": statistics.median(plain_ms), "pairs": repeats,
        "threads": torch.get_num_threads(), "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    """Command line: a table, then one JSON document."""
    with user_errors():
        result = from_command_line(tap_overhead)
        table = Table(title="Overhead of the router tap", show_header=False)
        for name, value in result.items():
            table.add_row(name, f"{value:.2%}" if name == "overhead" else str(value))
        Console().print(table)
        print_json(result)


if __name__ == "__main__":
    main()
