"""Converts expert loads that another system recorded into a trace of counts, which `data.show` and others read.

Run it with `python -m data.convert LOADS --out outputs/traces/other`; `data/traces/loads.py` lists the formats.
The simulator reads the same recordings without conversion.
"""

from pathlib import Path

from rich.console import Console

from data.cli import from_command_line, print_json, user_errors
from data.files import whole_folder
from data.models.layout import MoELayout
from data.text.batching import time_splits
from data.traces.loads import read_loads
from data.traces.store import StoredTrace, open_trace, write_about, write_counts_shard

SHARD_STEPS = 1024


def convert(loads: Path, out: Path = Path("outputs/traces/converted"), model_id: str = "") -> StoredTrace:
    """Converts recorded expert loads into a trace of counts.

    Args:
        loads: Counts (.npy, or .npz with the key `counts`), an SGLang recording (.pt, or a folder of them), or a folder
            of TensorRT-LLM's expert statistics.
        out: Folder of the new trace; it appears complete or not at all.
        model_id: Model name to store in the trace; by default the name of the recording.

    Raises:
        ValueError: If the recording cannot be read or the folder exists.
    """
    counts = read_loads(loads).loads
    steps, layers, experts = counts.shape
    layout = MoELayout(
        model_id or loads.stem, "", tuple(("decoder", layer) for layer in range(layers)), experts,
        expert_capacity=0, d_model=0, d_ff=0, vocab_size=0,
    )  # fmt: skip
    with whole_folder(out) as aside:
        shards = [
            write_counts_shard(aside / f"part-{index:05d}.parquet", first, counts[first : first + SHARD_STEPS])
            for index, first in enumerate(range(0, steps, SHARD_STEPS))
        ]
        write_about(aside, layout, shards, time_splits(steps), "counts", text=loads.name)
    return open_trace(out)


def main() -> None:
    """Command line of `convert`: where the trace is, then one JSON document."""
    with user_errors():
        trace = from_command_line(convert)
        layout = trace.layout
        Console(stderr=True).print(f"Wrote {trace.path}; look at it with `python -m data.show {trace.path}`")
        shape = [trace.num_batches, layout.num_layers, layout.num_experts]
        print_json({"trace": str(trace.path), "shape": shape})


if __name__ == "__main__":
    main()
