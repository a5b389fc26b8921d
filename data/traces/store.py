"""StoredTrace: a router trace on disk, Parquet shards and trace.json; reading and writing (docs/trace-format.md).

    trace = open_trace(Path("outputs/traces/switch-mini-64"))
    loads = trace.loads()  # [steps, L, E]

One row of a shard is one sequence; one column holds the experts of its tokens in one MoE layer, K for each token. In a
trace of counts, one row is one MoE layer of one batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from data.arrays import IntArray
from data.files import check_fetched, read_json, sha256, whole_file, write_json
from data.models.layout import MoELayout
from data.traces.columns import (
    counts_schema,
    counts_table,
    entries_column,
    input_tokens,
    sequence_schema,
    sequence_table,
    tokens_column,
)
from data.traces.recordings import TRACE_JSON
from data.traces.trace import PADDING, RouterTrace, TokenBatch

FORMAT_VERSION = 2
READ_VERSIONS = (1, FORMAT_VERSION)
Granularity = Literal["tokens", "counts"]
Shard = dict[str, Any]


def write_shard(path: Path, traces: list[RouterTrace], layout: MoELayout) -> Shard:
    """Writes batches to one Parquet file, completely or not at all; returns its entry for trace.json."""
    _write(path, sequence_table(traces, layout, FORMAT_VERSION))
    tokens = sum(trace.tokens.num_tokens for trace in traces)
    sequences = sum(len(trace.segments) for trace in traces)
    return {
        "file": path.name, "batches": len(traces), "sequences": sequences, "tokens": tokens, "sha256": sha256(path),
    }  # fmt: skip


def write_counts_shard(path: Path, first: int, loads: IntArray) -> Shard:
    """Writes loads `[steps, L, E]`, the first of batch number `first`; returns the file's entry for trace.json."""
    _write(path, counts_table(first, loads))
    return {"file": path.name, "batches": len(loads), "sha256": sha256(path)}


def _write(path: Path, table: pa.Table) -> None:
    with whole_file(path) as aside:
        pq.write_table(table, aside, compression="zstd")


def write_about(
    folder: Path, layout: MoELayout, shards: list[Shard], splits: list[str], granularity: Granularity, **facts: Any
) -> None:
    """Writes trace.json, which turns a folder of shards into a trace.

    Args:
        folder: Folder of the trace.
        layout: The model that was traced.
        shards: What `write_shard` or `write_counts_shard` returned, in order.
        splits: Split of each batch: "train", "gap", "val" or "test".
        granularity: "tokens" if every token was logged, "counts" if only the loads are known.
        facts: Further entries: the source of the text, settings, versions.
    """
    runs, start = [], 0
    for split, run in groupby(splits):
        stop = start + len(list(run))
        runs.append([split, start, stop])
        start = stop
    about = {"format_version": FORMAT_VERSION, "granularity": granularity, "layout": layout.to_json()}
    write_json(folder / TRACE_JSON, about | facts | {"splits": runs, "shards": shards})


@dataclass(frozen=True)
class StoredTrace:
    """An opened trace folder: trace.json is checked, the shards are read on request.

    Attributes:
        path: The folder.
        layout: The model that was traced.
        about: Content of trace.json.
    """

    path: Path
    layout: MoELayout
    about: dict[str, Any]
    only: str | None = None
    """Split whose batches `traces` reads; None reads all batches."""

    @property
    def num_batches(self) -> int:
        """Number of batches in all shards."""
        return sum(shard["batches"] for shard in self.about["shards"])

    @property
    def trained_on(self) -> dict[str, Any]:
        """What identifies the text that a predictor of this trace is trained on; see docs/trace-format.md."""
        keys = ("text", "text_column", "text_files", "batching", "held_out_from")
        return {key: self.about[key] for key in keys if key in self.about}

    @property
    def splits(self) -> list[str]:
        """Split of each batch."""
        return [split for split, start, stop in self.about["splits"] for _ in range(start, stop)]

    def traces(self) -> Iterator[RouterTrace]:
        """Yields the batches in order, one shard in memory at a time.

        Raises:
            ValueError: If a shard is missing, damaged, or of another trace; the message names it. Also if the trace
                holds counts only.
        """
        if self.about["granularity"] != "tokens":
            raise ValueError(f"{self.path} holds counts only, without tokens; only its loads can be used")
        schema = sequence_schema(self.layout, self.about.get("top", 0), self.about["format_version"])
        splits = self.splits
        start = 0 if self.num_batches == len(splits) else None  # else some of the shards are read alone
        for shard, (path, table) in zip(self.about["shards"], self._tables(schema), strict=True):
            batches = _by_batch(table)
            start = _check_numbers(path, [number for number, _ in batches], start, shard["batches"], len(splits))
            for number, rows in batches:
                if self.only not in (None, splits[number]):
                    continue
                try:
                    yield self._batch(number, rows)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from None

    def batches(self) -> Iterator[TokenBatch]:
        """Yields what is known of the input tokens of each batch before it runs."""
        return (trace.upcoming for trace in self.traces())

    def loads(self) -> IntArray:
        """Loads of all batches, `[steps, L, E]`."""
        if self.about["granularity"] == "tokens":
            return np.stack([trace.load(self.layout) for trace in self.traces()])
        return np.concatenate([loads for _, loads in self.load_shards()])

    def load_shards(self) -> Iterator[tuple[Path, IntArray]]:
        """Yields the file and the loads `[steps, L, E]` of each shard of counts, one shard in memory at a time."""
        for shard, (path, table) in zip(self.about["shards"], self._tables(counts_schema()), strict=True):
            yield path, self._counts(path, table, shard["batches"])

    def _counts(self, path: Path, table: pa.Table, steps: int) -> IntArray:
        """The loads of a shard of counts, `[steps, L, E]`."""
        shape = steps, self.layout.num_layers, self.layout.num_experts
        rows = table["counts"].combine_chunks()
        whole = not rows.null_count and not rows.values.null_count
        if not whole or len(rows) != steps * shape[1] or set(rows.value_lengths().to_pylist()) - {shape[2]}:
            raise ValueError(f"{path} holds other counts than those of {shape} steps, layers and experts")
        counts: IntArray = rows.flatten().to_numpy().reshape(shape)
        if counts.size and counts.min() < 0:
            raise ValueError(f"{path} holds {counts.min()}; tokens cannot be negative")
        return counts

    def _tables(self, schema: pa.Schema) -> Iterator[tuple[Path, pa.Table]]:
        """The table of each shard, checked against its digest and its columns."""
        for shard in self.about["shards"]:
            path = self.path / shard["file"]
            if not path.exists():
                raise ValueError(f"{path} is missing; collect the trace again")
            check_fetched(path)
            if (digest := sha256(path)) != shard["sha256"]:
                raise ValueError(
                    f"{path} has sha256 {digest[:12]}, trace.json says {shard['sha256'][:12]}; "
                    "it was cut short, edited, or belongs to another trace"
                )
            try:
                table = pq.read_table(path)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{path} cannot be read as Parquet: {error}") from None
            if table.schema != schema:
                raise ValueError(f"{path} has columns {table.schema.names}, expected {schema.names}")
            yield path, table

    def _batch(self, number: int, rows: pa.Table) -> RouterTrace:
        tokens, decoder = input_tokens(rows), tokens_column(rows, "decoder_tokens")
        split, top_k = self.layout.num_input_layers, self.layout.experts_per_token
        names = self.layout.layer_names
        computed = [tokens.computed] * split + [decoder.mask] * (len(names) - split)
        experts = [
            entries_column(rows, name, routed, top_k, PADDING) for name, routed in zip(names, computed, strict=True)
        ]
        for name, ids in zip(names, experts, strict=True):
            if ids.numel() and int(ids.max()) >= self.layout.num_experts:
                raise ValueError(f"{name} holds expert {int(ids.max())}; the model has {self.layout.num_experts}")
        top_experts, top_probabilities = self._top(rows, tokens, names[:split])
        return RouterTrace(
            batch=number,
            phase=rows["phase"][0].as_py(),
            split=next(name for name, start, stop in self.about["splits"] if start <= number < stop),
            segments=tuple(rows["segment"].to_pylist()),
            tokens=tokens,
            decoder_tokens=decoder,
            experts=_stack(experts[:split], tokens, top_k),
            decoder_experts=_stack(experts[split:], decoder, top_k),
            stepwise=self.about.get("decode") == "generate",
            top_experts=top_experts,
            top_probabilities=top_probabilities,
        )

    def _top(self, rows: pa.Table, tokens: TokenBatch, names: list[str]) -> tuple[Tensor | None, Tensor | None]:
        """Reads likeliest experts and their probabilities, `[L_in, B, T, top]`; None if they were not logged."""
        if not (top := self.about.get("top", 0)):
            return None, None
        experts = [entries_column(rows, f"{name}_top", tokens.computed, top) for name in names]
        probabilities = [entries_column(rows, f"{name}_top_probability", tokens.computed, top) for name in names]
        return torch.stack(experts), torch.stack(probabilities)


def _stack(layers: list[Tensor], tokens: TokenBatch, top_k: int) -> Tensor:
    return torch.stack(layers) if layers else torch.zeros((0, *tokens.mask.shape, top_k), dtype=torch.int16)


def _by_batch(table: pa.Table) -> list[tuple[int, pa.Table]]:
    """The number and the rows of each batch of a shard."""
    numbers = table["batch"].to_numpy()
    if not len(numbers):
        return []
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return [(int(numbers[start]), table.slice(start, stop - start)) for start, stop in pairwise(edges)]


def _check_numbers(path: Path, numbers: list[int], start: int | None, count: int, total: int) -> int:
    """Refuses a shard whose batches are others than trace.json says; returns the number behind its last one.

    Args:
        path: The shard.
        numbers: Numbers of its batches.
        start: Number of its first batch; None if it is not known.
        count: Its batches, according to trace.json.
        total: Batches of the trace.
    """
    first = start if start is not None else min(numbers, default=0)
    if numbers != list(range(first, first + count)) or not 0 <= first <= total - count:
        found = f"{len(numbers)} batches, {numbers[0]} to {numbers[-1]}" if numbers else "no batch"
        raise ValueError(f"{path} holds {found}; trace.json has {count} in it; the trace was edited or cut short")
    return first + count


def open_trace(path: Path | str) -> StoredTrace:
    """Opens a trace folder.

    Raises:
        ValueError: If the folder holds no complete trace in a format version that this code reads.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; expected a trace written by `python -m data.collect`")
    about = read_json(path / TRACE_JSON)
    if about.get("format_version") not in READ_VERSIONS:
        raise ValueError(
            f"{path / TRACE_JSON} has format version {about.get('format_version')}; this version reads "
            f"{' and '.join(map(str, READ_VERSIONS))}"
        )
    if missing := {"layout", "granularity", "splits", "shards"} - about.keys():
        raise ValueError(f"{path / TRACE_JSON} lacks {sorted(missing)}; it was edited or cut short")
    _check_lists(path / TRACE_JSON, about)
    return StoredTrace(path, MoELayout.from_json(about["layout"]), about)


def _check_lists(path: Path, about: dict[str, Any]) -> None:
    """Refuses shards and splits that do not describe batches.

    Raises:
        ValueError: If an entry lacks a field or has one of another type, or the splits do not cover the batches.
    """
    kinds = {"file": str, "sha256": str, "batches": int}
    shards, splits = about["shards"], about["splits"]
    for shard in shards if isinstance(shards, list) else [None]:
        if not (isinstance(shard, dict) and all(isinstance(shard.get(name), kind) for name, kind in kinds.items())):
            raise ValueError(
                f"{path}: a shard is {shard}, expected its file, sha256 and batches; collect the trace again"
            )
    files = [shard["file"] for shard in shards]
    if twice := [file for file in files if files.count(file) > 1]:
        raise ValueError(f"{path}: the shard {twice[0]} is listed {files.count(twice[0])} times, expected once")
    total, at = sum(shard["batches"] for shard in shards), 0
    for run in splits if isinstance(splits, list) else [None]:
        if not (isinstance(run, list) and [type(part) for part in run] == [str, int, int] and run[1] == at <= run[2]):
            raise ValueError(f"{path}: splits hold {run}, expected runs [split, start, stop] one after the other")
        at = run[2]
    if total != at:
        raise ValueError(f"{path}: splits cover {at} batches, shards hold {total}; it was edited or cut short")
