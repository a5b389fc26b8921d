"""Overhead of the router tap: time of the same batches with and without it, measured alternately.

Run it with `python -m benchmarks.tap_overhead`; the last line of stdout is one JSON document.
"""

import json
import os
import platform
import statistics
import time
from itertools import islice

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data.cli import from_command_line, user_errors
from data.models.model import LoadedModel, load_model
from data.models.weights import BUNDLED
from data.text.batching import BatchingConfig
from data.text.corpus_stream import open_stream
from data.traces.router_tap import RouterTap
from data.traces.trace import TokenBatch
from data.traces.tracer import model_inputs


@torch.inference_mode()
def milliseconds(switch: LoadedModel, batches: list[tuple[TokenBatch, TokenBatch]], tap: RouterTap | None) -> float:
    """Milliseconds of one pass over the batches; a tap is emptied after each batch, as `data.collect` does."""
    start = time.perf_counter()
    for tokens, decoder in batches:
        switch.model(input_ids=tokens.input_ids, attention_mask=tokens.mask.long(), decoder_input_ids=decoder.input_ids)
        if tap is not None:
            tap.take()
    return 1e3 * (time.perf_counter() - start)


def tap_overhead(model: str = BUNDLED, repeats: int = 10, batches: int = 4) -> dict[str, object]:
    """Measures the overhead of the tap as the median over pairs of measurements, one with and one without it.

    Args:
        model: 'switch-mini-64' (bundled), a local folder, or a hub id.
        repeats: Number of pairs.
        batches: Batches of 16 sequences in one measurement.
    """
    switch = load_model(model)
    batching = BatchingConfig(smallest=16, largest=16)
    stream = islice(open_stream(None, switch.tokenizer, "teacher", batching), batches)
    inputs = [model_inputs(batch, switch.model.config) for batch in stream]
    milliseconds(switch, inputs, None)  # warm-up
    ratios, plain_ms = [], []
    for turn in track(range(repeats), "pairs", console=Console(stderr=True)):
        with RouterTap(switch.model, switch.layout) as tap:
            tapped = milliseconds(switch, inputs, tap) if turn % 2 else None
        plain = milliseconds(switch, inputs, None)
        with RouterTap(switch.model, switch.layout) as tap:
            tapped = tapped or milliseconds(switch, inputs, tap)
        ratios.append(tapped / plain)
        plain_ms.append(plain)
    spread = statistics.quantiles(ratios, n=4)
    return {
        "model": switch.layout.model_id, "overhead": statistics.median(ratios) - 1,
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
        print(json.dumps(result))


if __name__ == "__main__":
    main()
