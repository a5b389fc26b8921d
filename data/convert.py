"""Converts what another system recorded into a trace: expert loads into counts, requests token by token into tokens.

Run it with `python -m data.convert FILE --out outputs/traces/other`; `data/traces/loads.py` lists the formats of loads,
`data/traces/token_recording.py` the arrays of requests. The simulator reads recorded loads without conversion.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console

from data.arrays import IntArray
from data.cli import from_command_line, print_json, user_errors
from data.files import check_new, whole_folder
from data.models.layout import MoELayout
from data.shell import typed
from data.text.batching import time_splits
from data.traces.loads import read_loads
from data.traces.recordings import recordings
from data.traces.requests import CONTEXT, check_serving, serve, step_trace
from data.traces.store import StoredTrace, open_trace, write_about, write_counts_shard, write_shard
from data.traces.token_recording import divided, holds_tokens, read_token_recording

SHARD_STEPS = 256


def convert(
    loads: Path,
    out: Path = Path("outputs/traces/converted"),
    model_id: str = "",
    num_experts: int | None = None,
    slots: int = 4,
    chunk: int = 128,
    context: int = CONTEXT,
) -> StoredTrace:
    """Converts a recording into a trace.

    Loads become a trace of counts; of a folder of recordings, one after the other in order of their names. Requests
    token by token (.npz with the array `tokens`) become a trace of tokens: continuous batching with chunked prefill,
    subject after subject; some subjects are held out as phase `unseen`.

    Args:
        loads: Counts (.npy, or .npz with the key `counts`), vLLM's routed_experts (.npz with that key, or
            *routed_experts.npy), Megatron's router trace (.jsonl, or a folder of them), an SGLang recording (.pt, or a
            folder of them), a folder of TensorRT-LLM's expert statistics, a folder of such recordings, each with other
            steps, or requests token by token (.npz).
        out: Folder of the new trace; it appears complete or not at all.
        model_id: Model name to store in the trace; by default the name of the recording.
        num_experts: Experts of a layer, for recordings of expert ids; by default one more than the largest id.
        slots: Requests of a step, where tokens were recorded.
        chunk: Most tokens of a request in a step.
        context: Most tokens before a chunk that are kept for forecasters to read.

    Raises:
        ValueError: If the recording cannot be read or the folder exists.
    """
    check_new(out)
    if holds_tokens(loads):
        return _convert_tokens(loads, out, model_id, num_experts, slots, chunk, context)
    with whole_folder(out) as aside:
        shards, steps = [], 0
        for index, counts in enumerate(_blocks(recordings(loads), num_experts)):
            shards.append(write_counts_shard(aside / f"part-{index:05d}.parquet", steps, counts))
            steps += len(counts)
        _, layers, experts = counts.shape
        layout = MoELayout(
            model_id or loads.stem, "", tuple(("decoder", layer) for layer in range(layers)), experts,
            expert_capacity=0, d_model=0, d_ff=0, vocab_size=0,
        )  # fmt: skip
        write_about(aside, layout, shards, time_splits(steps), "counts", text=loads.name)
    return open_trace(out)


def _blocks(paths: list[Path], num_experts: int | None) -> Iterator[IntArray]:
    """Loads `[SHARD_STEPS, L, E]` of recordings one after the other, one recording in memory at a time; the last block
    may be shorter.

    Raises:
        ValueError: If a recording cannot be read, or is of other layers and experts than those before it.
    """
    left: IntArray | None = None
    for path in paths:
        loads = read_loads(path, num_experts).loads
        if left is not None and left.shape[1:] != loads.shape[1:]:
            raise ValueError(
                f"{path} has {loads.shape[1:]} layers and experts, the recordings before it {left.shape[1:]}; expected "
                "recordings of one model (where ids were recorded, give --num-experts)"
            )
        left = loads if left is None else np.concatenate([left, loads])
        whole = len(left) // SHARD_STEPS * SHARD_STEPS
        yield from (left[first : first + SHARD_STEPS] for first in range(0, whole, SHARD_STEPS))
        left = left[whole:]
    if left is not None and len(left):
        yield left


def _convert_tokens(
    path: Path, out: Path, model_id: str, num_experts: int | None, slots: int, chunk: int, context: int
) -> StoredTrace:
    """Requests to steps, the parts of `divided` one after the other, so that no step mixes splits."""
    check_serving(slots, chunk)
    if context < 0:
        raise ValueError(f"context is {context}, expected 0 or more tokens")
    requests, layout = read_token_recording(path, model_id, num_experts)
    parts = groupby(divided(requests), key=lambda request: (request.split, request.phase))
    steps = [step for _, part in parts for step in serve(part, slots, chunk)]
    with whole_folder(out) as aside:
        shards = []
        for index, first in enumerate(range(0, len(steps), SHARD_STEPS)):
            traces = [step_trace(first + n, step, context) for n, step in enumerate(steps[first : first + SHARD_STEPS])]
            shards.append(write_shard(aside / f"part-{index:05d}.parquet", traces, layout))
        splits = [step[0].request.split for step in steps]
        serving = {"slots": slots, "chunk": chunk, "context": context}
        write_about(aside, layout, shards, splits, "tokens", text=path.name, decode="teacher", serving=serving)
    return open_trace(out)


def main() -> None:
    """Command line of `convert`: where the trace is, then one JSON document."""
    with user_errors():
        trace = from_command_line(convert)
        layout = trace.layout
        look = typed(f"python -m data.show {trace.path}")
        Console(stderr=True).print(f"Wrote {trace.path}; look at it with `{look}`")
        shape = [trace.num_batches, layout.num_layers, layout.num_experts]
        print_json({"trace": str(trace.path), "shape": shape})


if __name__ == "__main__":
    main()
