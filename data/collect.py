"""Logs a router trace: a Switch model reads a stream of batches, its routers are tapped, what they did is stored.

Run it with `python -m data.collect --out outputs/traces/switch-mini-64`; with no --text it reads the offline corpus.
Under `torchrun --nproc-per-node N -m data.collect ...` the ranks share the stream; the trace is the same to the byte.
"""

import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

from data.cli import from_command_line, user_errors
from data.files import read_json, sha256, write_json
from data.models.switch import Dtype, LoadedSwitch, load_switch
from data.models.weights import BUNDLED
from data.text.batching import BatchingConfig, Decode, TextBatch, time_splits
from data.text.corpus_stream import corpus_splits, open_stream
from data.traces.router_tap import RouterTap
from data.traces.store import Shard, StoredTrace, open_trace, write_about, write_shard
from data.traces.tracer import Tracer

SHARD_BATCHES = 32


OFFLINE = "offline corpus"


class Ranks:
    """This process among those that share a job; a process group is opened only where there are several.

    Attributes:
        rank: 0..world - 1.
        world: Number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    @staticmethod
    def is_first() -> bool:
        """Whether this process is the one that reports."""
        return int(os.environ.get("RANK", 0)) == 0

    def __enter__(self) -> "Ranks":
        if self.world > 1:
            dist.init_process_group("gloo")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.world > 1:
            dist.barrier()


def _request(switch: LoadedSwitch, **settings: Any) -> dict[str, Any]:
    """Everything the bytes of a trace depend on."""
    libraries = {name: version(name) for name in ("torch", "transformers", "numpy", "pyarrow")}
    versions = libraries | {"python": platform.python_version()}
    return {"layout": switch.layout.to_json(), **settings, "versions": versions}


def _prepare(partial: Path, request: dict[str, Any]) -> None:
    """Makes the folder to write into; what an interrupted run of another request left there is removed."""
    started = partial / "request.json"
    if not (started.exists() and read_json(started) == request):
        shutil.rmtree(partial, ignore_errors=True)
        write_json(started, request)


def _whole_shard(partial: Path, index: int) -> Shard | None:
    """The entry of a shard that an interrupted run finished, None if it is to be made."""
    entry = partial / f"shard-{index:05d}.json"
    if not entry.exists():
        return None
    shard = read_json(entry)
    file = partial / shard["file"]
    return shard if file.exists() and sha256(file) == shard["sha256"] else None


def _write_shards(partial: Path, stream: Iterator[TextBatch], tracer: Tracer, ranks: Ranks, total: int) -> None:
    """Traces this rank's share of the stream shard by shard; whole shards are kept."""
    with Progress(console=Console(stderr=True), disable=ranks.rank > 0) as progress:
        task, index = progress.add_task("tracing", total=total), 0
        while chunk := list(islice(stream, SHARD_BATCHES)):
            if index % ranks.world == ranks.rank and _whole_shard(partial, index) is None:
                traces = []
                for batch in chunk:
                    traces.append(tracer.trace(batch))
                    progress.advance(task)
                shard = write_shard(partial / f"part-{index:05d}.parquet", traces, tracer.switch.layout)
                write_json(partial / f"shard-{index:05d}.json", shard)
            progress.update(task, completed=min((index + 1) * SHARD_BATCHES, total))
            index += 1


def _finish(partial: Path, out: Path, switch: LoadedSwitch, request: dict[str, Any], traffic: BatchingConfig) -> None:
    """Writes trace.json, removes the bookkeeping, gives the folder its name."""
    entries = sorted(partial.glob("shard-*.json"))
    shards = [read_json(entry) for entry in entries]
    count = sum(shard["batches"] for shard in shards)
    splits = corpus_splits(traffic) if request["text"] == OFFLINE else time_splits(count)
    facts = {key: value for key, value in request.items() if key != "layout"}
    write_about(partial, switch.layout, shards, splits, "tokens", **facts)
    for leftover in [partial / "request.json", *entries]:
        leftover.unlink()
    partial.rename(out)


def collect(
    model: str = BUNDLED,
    out: Path = Path("outputs/traces/switch-mini-64"),
    text: str | None = None,
    decode: Decode = "teacher",
    traffic: BatchingConfig = BatchingConfig(),
    max_new_tokens: int = 32,
    probabilities: bool = False,
    dtype: Dtype = "float32",
    revision: str = "",
    top: int = 0,
) -> StoredTrace:
    """Logs the router trace of a Switch model over a stream of text.

    A trace of the same request that is already there is reused; an interrupted one resumes at its last whole shard.

    Args:
        model: 'switch-mini-64' (bundled), a local folder, or a hub id such as google/switch-base-8.
        out: Folder of the trace; it appears whole or not at all.
        text: File, folder or hub data set `owner/name[:config[:split]]`; the offline corpus by default.
        decode: "teacher" masks spans of the text and feeds the decoder the truth, "generate" lets the decoder write
            greedily, token by token, "none" runs the encoder alone.
        traffic: How the stream is cut into batches.
        max_new_tokens: Most tokens the decoder writes with --decode generate.
        probabilities: Whether the router's probability of the chosen expert is kept as well, as float16.
        dtype: What the model's weights are cast to.
        revision: Revision of a hub model.
        top: How many of each encoder token's likeliest experts are kept with their probabilities, to distil from.

    Raises:
        ValueError: On a model, text or folder that cannot be used; the message says what to do.
    """
    switch = load_switch(model, revision, dtype)
    request = _request(
        switch, text=text or OFFLINE, decode=decode, traffic=asdict(traffic), max_new_tokens=max_new_tokens,
        probabilities=probabilities, dtype=dtype, **({"top": top} if top else {}),
    )  # fmt: skip
    if out.exists():
        return _reuse(out, request)
    partial = out.with_name(out.name + ".partial")
    with Ranks() as ranks:
        if ranks.rank == 0:
            _prepare(partial, request)
        ranks.barrier()
        total = len(corpus_splits(traffic)) if text is None else traffic.batches
        stream = open_stream(text, switch.tokenizer, decode, traffic)
        with RouterTap(switch.model, switch.layout, top) as tap:
            _write_shards(partial, stream, Tracer(switch, tap, decode, max_new_tokens, probabilities), ranks, total)
        ranks.barrier()
        if ranks.rank == 0:
            _finish(partial, out, switch, request, traffic)
        ranks.barrier()
    return open_trace(out)


def _reuse(out: Path, request: dict[str, Any]) -> StoredTrace:
    found = open_trace(out)
    if differing := [key for key in request if found.about.get(key) != request[key]]:
        raise ValueError(f"{out} holds another trace ({', '.join(differing)} differ); name another --out or remove it")
    Console(stderr=True).print(f"Reusing the trace in {out} ({found.num_batches} batches)")
    return found


def main() -> None:
    """Command line of `collect`; the last line of stdout is one JSON document."""
    with user_errors():
        trace = from_command_line(collect)
        sums = {key: sum(shard[key] for shard in trace.about["shards"]) for key in ("batches", "sequences", "tokens")}
        if Ranks.is_first():
            print(json.dumps({"trace": str(trace.path), **sums, "fingerprint": trace.layout.fingerprint()}))


if __name__ == "__main__":
    main()
