"""Collects a router trace: runs a model over text and stores the experts of every token.

Run it with `python -m data.collect --out outputs/traces/switch-mini-64`; without --text it reads the offline corpus.
Under `torchrun --nproc-per-node N -m data.collect ...` the ranks divide the work; the trace is identical byte for byte.
"""

import os
import platform
from collections.abc import Iterator, Set
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from data.cli import from_command_line, print_json, user_errors
from data.files import held, read_json, sha256, write_json
from data.models.device import Device, pick_device
from data.models.layout import MoELayout
from data.models.model import Dtype, LoadedModel, load_model
from data.models.weights import BUNDLED
from data.progress import progress
from data.shell import typed
from data.text.batching import BatchingConfig, Decode, TextBatch, time_splits
from data.text.corpus import OFFLINE
from data.text.corpus_stream import corpus_splits, open_stream
from data.text.source import TextSource, open_text
from data.traces.router_tap import RouterTap
from data.traces.store import Shard, StoredTrace, open_trace, write_about, write_shard
from data.traces.text_tracer import TextTracer
from data.traces.tracer import Tracer

SHARD_BATCHES = 32
LAYOUT = "layout"
"""Key of a request that holds the model's layout."""
DEVICE = "device"
"""Key of a request that says where the model ran; absent for the CPU."""
FILES = "text_files"
"""Key of a request that holds the digest of each file of the user's text; absent for the offline corpus."""


class Ranks:
    """The processes of a torchrun job, in a process group while the context is open; without torchrun just this one.

    Attributes:
        rank: Rank of this process, 0..world - 1.
        world: Number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def __enter__(self) -> "Ranks":
        if self.world > 1:
            dist.init_process_group("gloo")
        return self

    def __exit__(self, *exc: object) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Waits until every rank has reached the barrier."""
        if self.world > 1:
            dist.barrier()


def _request(loaded: LoadedModel, **settings: Any) -> dict[str, Any]:
    """All settings that the bytes of a trace depend on."""
    libraries = {name: version(name) for name in ("torch", "transformers", "numpy", "pyarrow")}
    versions = libraries | {"python": platform.python_version()}
    return {LAYOUT: loaded.layout.to_json(), **settings, "versions": versions}


def _prepare(partial: Path, request: dict[str, Any]) -> None:
    """Creates the folder to write to; shards of an interrupted run of the same request are kept.

    Raises:
        ValueError: If shards of another request are there.
    """
    started = partial / "request.json"
    if started.exists() and any(partial.glob("shard-*.json")):
        found = read_json(started)
        if differing := _differing(request, found, request.keys() | found.keys()):
            raise ValueError(
                f"{partial} holds a trace that was interrupted (different {', '.join(differing)}); remove it or name "
                "another --out"
            )
        return
    for leftover in partial.iterdir():
        leftover.unlink()
    write_json(started, request)


def _differing(request: dict[str, Any], found: dict[str, Any], keys: Set[str]) -> list[str]:
    """In which of some keys a trace differs from a request, as they are called in messages."""
    names = {LAYOUT: "model", FILES: "content of the text"}
    return sorted(names.get(key, key) for key in keys if found.get(key) != request.get(key))


def _files(source: TextSource, out: Path) -> dict[str, str] | None:
    """Digests of the text's files; None if the hub cannot be reached and a finished trace is there."""
    try:
        return source.files
    except ValueError:
        if out.exists():
            return None
        raise


def _finished_shard(partial: Path, index: int) -> Shard | None:
    """The entry of a shard that an interrupted run finished; None if the shard must be traced."""
    entry = partial / f"shard-{index:05d}.json"
    if not entry.exists():
        return None
    shard = read_json(entry)
    file = partial / shard["file"]
    return shard if file.exists() and sha256(file) == shard["sha256"] else None


def _write_shards(
    partial: Path, stream: Iterator[TextBatch], tracer: Tracer | TextTracer, ranks: Ranks, total: int
) -> list[int]:
    """Traces this rank's shards, every `world`-th one; finished shards are kept.

    Returns:
        Of each batch of the stream the documents that were begun up to its end.
    """
    documents: list[int] = []
    with progress(None if ranks.rank > 0 else Console(stderr=True)) as bars:
        task, index = bars.add_task("tracing", total=total), 0
        while chunk := list(islice(stream, SHARD_BATCHES)):
            documents += [batch.documents for batch in chunk]
            if index % ranks.world == ranks.rank and _finished_shard(partial, index) is None:
                traces = []
                for batch in chunk:
                    traces += tracer.traces(batch)
                    bars.advance(task)
                shard = write_shard(partial / f"part-{index:05d}.parquet", traces, tracer.loaded.layout)
                write_json(partial / f"shard-{index:05d}.json", shard)
            bars.update(task, completed=min((index + 1) * SHARD_BATCHES, total))
            index += 1
    return documents


def _finish(
    partial: Path, out: Path, tracer: Tracer | TextTracer, request: dict[str, Any], batching: BatchingConfig,
    documents: list[int],
) -> None:  # fmt: skip
    """Writes trace.json, removes temporary files, and renames the folder.

    The user's documents from number `held_out_from` on are in no batch for training or validation.
    """
    entries = sorted(partial.glob("shard-*.json"))
    shards = [read_json(entry) for entry in entries]
    texts = sum(shard["batches"] for shard in shards) // tracer.steps
    of_texts = corpus_splits(batching) if request["text"] == OFFLINE else time_splits(texts)
    splits = [split for split in of_texts for _ in range(tracer.steps)]
    facts = {key: value for key, value in request.items() if key != LAYOUT}
    if FILES in request:
        facts["held_out_from"] = documents[[*of_texts, "test"].index("test") - 1]
    write_about(partial, tracer.loaded.layout, shards, splits, "tokens", **facts)
    for leftover in [partial / "request.json", *entries]:
        leftover.unlink()
    partial.rename(out)


def collect(
    model: str = BUNDLED,
    out: Path = Path("outputs/traces/switch-mini-64"),
    text: str | None = None,
    text_column: str | None = None,
    decode: Decode = "teacher",
    batching: BatchingConfig = BatchingConfig(),
    max_new_tokens: int = 32,
    dtype: Dtype = "float32",
    revision: str = "",
    top: int = 0,
    device: Device | None = None,
) -> StoredTrace:
    """Collects the router trace of a model over a stream of text.

    The model is a Switch Transformer, or a decoder-only model with the experts interface of transformers.

    An existing trace of the same request is reused, unless the content of the text has changed. After an interruption,
    the same command resumes at the last finished shard.

    Args:
        model: 'switch-mini-64' or 'qwen3-mini-64' (bundled), a local folder, or a hub id such as google/switch-base-8.
        out: Folder of the trace; it appears complete or not at all.
        text: File, folder or hub data set `owner/name[:config[:split]]`; the offline corpus by default. Files of a
            folder take turns; data/text/text_file.py says what a document is.
        text_column: Column of text in .csv, .json, .jsonl, .parquet and hub data sets; "text" by default.
        decode: "teacher" masks spans of the text and feeds the decoder the true tokens, "generate" decodes greedily,
            token by token, "none" runs the encoder alone. A decoder-only model is run on the text as it is; with
            "generate" it then writes `max_new_tokens` tokens, and each step becomes a batch of phase `decode`.
        batching: Settings that cut text into batches.
        max_new_tokens: Most tokens the decoder generates with --decode generate.
        dtype: Dtype of the model's weights: bfloat16 halves its memory and is fastest on a GPU.
        revision: Revision of a hub model.
        top: Number of likeliest experts logged for each input token with their probabilities, for distillation; of a
            decoder-only model all that its router chooses.
        device: Where the model runs: CUDA where there is a device for this process, else the CPU. A finished trace of
            another device is reused, because only routes that were nearly undecided differ.

    Raises:
        ValueError: If the model, text or folder cannot be used; the message says what to do.
    """
    source = open_text(text, text_column)
    of_text = {} if source is None else {"text_column": text_column, FILES: _files(source, out)}
    place = pick_device(device)
    loaded = load_model(model, revision, dtype)
    loaded.model.to(place)
    named = ({"top": top} if top else {}) | ({DEVICE: place.type} if place.type != "cpu" else {})
    request = _request(
        loaded, text=text or OFFLINE, decode=decode, batching=asdict(batching), max_new_tokens=max_new_tokens,
        dtype=dtype, **of_text, **named,
    )  # fmt: skip
    if out.exists():
        return _reuse(out, request)
    partial = out.with_name(out.name + ".partial")
    with Ranks() as ranks, held(partial) if ranks.rank == 0 else nullcontext():
        if ranks.rank == 0:
            _prepare(partial, request)
        ranks.barrier()
        total = len(corpus_splits(batching)) if text is None else batching.batches
        stream = open_stream(source, loaded.tokenizer, decode, batching, loaded.layout.causal)
        with RouterTap(loaded.model, loaded.layout, top) as tap:
            tracer = (TextTracer if loaded.layout.causal else Tracer)(loaded, tap, decode, max_new_tokens)
            documents = _write_shards(partial, stream, tracer, ranks, total)
        ranks.barrier()
        if ranks.rank == 0:
            _finish(partial, out, tracer, request, batching, documents)
            if source is not None:
                Console(stderr=True).print(source.table())
        ranks.barrier()
    return open_trace(out)


def _reuse(out: Path, request: dict[str, Any]) -> StoredTrace:
    found, unknown = open_trace(out), set[str]()
    if FILES in request and (request[FILES] is None or FILES not in found.about):
        unknown = {FILES}
    differing = _differing(request, found.about, request.keys() - {DEVICE, LAYOUT} - unknown)
    layout = MoELayout.from_json(request[LAYOUT])
    names = [(each.model_id, each.revision) for each in (found.layout, layout)]
    if not found.layout.is_same(layout) or names[0] != names[1]:
        differing.insert(0, "model")
    if differing:
        raise ValueError(
            f"{out} holds another trace (different {', '.join(differing)}); name another --out or remove it"
        )
    note = "; whether its text has changed since is not known" if unknown else ""
    Console(stderr=True).print(f"Reusing the trace in {out} ({found.num_batches} batches){note}")
    return found


def main() -> None:
    """Command line of `collect`: what was collected and where, then one JSON document."""
    with user_errors("run the same command again to resume at the last finished shard"):
        trace = from_command_line(collect)
        sums = {key: sum(shard[key] for shard in trace.about["shards"]) for key in ("batches", "sequences", "tokens")}
        if Ranks().rank == 0:
            found = f"{sums['batches']} batches, {sums['tokens']:,} tokens"
            Console(stderr=True).print(f"{found}; look at them with `{typed(f'python -m data.show {trace.path}')}`")
            print_json({"trace": str(trace.path), **sums, "fingerprint": trace.layout.fingerprint()})


if __name__ == "__main__":
    main()
