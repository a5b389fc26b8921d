"""Arrow columns of a trace's shards: schemas, router traces and counts to tables, columns back to tensors."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data.arrays import IntArray
from data.models.layout import MoELayout
from data.traces.trace import RouterTrace, TokenBatch, pad_tokens

Ragged = list[np.ndarray[Any, Any]]


def sequence_schema(layout: MoELayout, top: int, version: int) -> pa.Schema:
    """Columns of one sequence: its batch, its tokens, and the expert ids of each MoE layer.

    Format 2 adds the request and the number of context tokens. With `top`, each MoE layer of the input has two more
    columns: likeliest experts and their probabilities.
    """
    expert = pa.uint8() if layout.num_experts <= 256 else pa.int16()
    fields = [("batch", pa.int32()), ("phase", pa.string()), ("segment", pa.string()), ("length", pa.int32())]
    if version > 1:
        fields += [("request", pa.int64()), ("context", pa.int32())]
    fields += [("tokens", pa.list_(pa.int32())), ("decoder_tokens", pa.list_(pa.int32()))]
    fields += [(name, pa.list_(expert)) for name in layout.layer_names]
    if top:
        for name in layout.layer_names[: layout.num_input_layers]:
            fields += [(f"{name}_top", pa.list_(expert)), (f"{name}_top_probability", pa.list_(pa.float16()))]
    return pa.schema(fields)


def sequence_table(traces: list[RouterTrace], layout: MoELayout, version: int) -> pa.Table:
    """Converts batches to a table with one row per sequence; padding is left out."""
    top = traces[0].top_experts
    schema = sequence_schema(layout, 0 if top is None else top.shape[-1], version)
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for trace in traces:
        tokens, size = trace.tokens, len(trace.segments)
        columns["batch"] += [trace.batch] * size
        columns["phase"] += [trace.phase] * size
        columns["segment"] += trace.segments
        columns["length"] += tokens.mask.sum(1).tolist()
        columns["request"] += [None] * size if tokens.requests is None else tokens.requests.tolist()
        columns["context"] += (tokens.mask & ~tokens.computed).sum(1).tolist()
        columns["tokens"] += _ragged(tokens.input_ids, tokens.mask)
        columns["decoder_tokens"] += _ragged(trace.decoder_tokens.input_ids, trace.decoder_tokens.mask)
        for name, rows in zip(layout.layer_names, _layers(trace), strict=True):
            columns[name] += rows
        for name, experts, probabilities in _top_entries(trace, layout):
            columns[f"{name}_top"] += experts
            columns[f"{name}_top_probability"] += probabilities
    return pa.table(columns, schema=schema)


def _layers(trace: RouterTrace) -> list[Ragged]:
    layers = [_ragged(layer, trace.tokens.computed) for layer in trace.experts]
    return layers + [_ragged(layer, trace.decoder_tokens.mask) for layer in trace.decoder_experts]


def _top_entries(trace: RouterTrace, layout: MoELayout) -> Iterator[tuple[str, Ragged, Ragged]]:
    """Yields each input layer's name, likeliest experts, and their probabilities, token after token."""
    if trace.top_experts is None or trace.top_probabilities is None:
        return
    for name, *pair in zip(layout.layer_names, trace.top_experts, trace.top_probabilities, strict=False):
        experts, probabilities = (_ragged(values, trace.tokens.computed) for values in pair)
        yield name, experts, probabilities


def _ragged(values: Tensor, keep: Tensor) -> Ragged:
    return [row[kept].flatten().numpy() for row, kept in zip(values, keep, strict=True)]


def _complete(rows: pa.Table, name: str) -> pa.ListArray:
    """A list column in one piece.

    Raises:
        ValueError: If it has missing values.
    """
    chunk = rows[name].combine_chunks()
    if chunk.null_count or chunk.values.null_count:
        raise ValueError(f"column {name} has missing values; expected a number for every token")
    return chunk


def tokens_column(rows: pa.Table, name: str, pad: int = 0) -> TokenBatch:
    """Reads a list column of one batch, right-padded to `[B, T]`."""
    chunk = _complete(rows, name)
    values, offsets = chunk.flatten().to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
    return pad_tokens(np.split(values, (offsets - offsets[0])[1:-1]), pad)


def input_tokens(rows: pa.Table) -> TokenBatch:
    """Reads the input tokens of one batch with their context and requests, right-padded to `[B, T]`."""
    tokens = tokens_column(rows, "tokens")
    if "request" not in rows.column_names:  # format 1
        return tokens
    requests, context = rows["request"], torch.from_numpy(rows["context"].to_numpy().copy())
    if bool((context < 0).any()) or bool((context > tokens.mask.sum(1)).any()):
        raise ValueError(f"context holds {context.tolist()}, expected 0 to the number of tokens of each sequence")
    before = torch.arange(tokens.mask.shape[1]) < context[:, None]
    return replace(
        tokens,
        context=before if bool(before.any()) else None,
        requests=None if requests.null_count else torch.from_numpy(requests.to_numpy().copy()),
    )


def entries_column(rows: pa.Table, name: str, computed: Tensor, entries: int, fill: int = 0) -> Tensor:
    """Reads a list column with `entries` numbers for each computed token of one batch, `[B, T, entries]`.

    Raises:
        ValueError: If a sequence has more or fewer numbers.
    """
    chunk = _complete(rows, name)
    found, expected = np.diff(chunk.offsets.to_numpy()), entries * computed.sum(1).numpy()
    if not np.array_equal(found, expected):
        raise ValueError(f"column {name} holds {found.tolist()} entries, the tokens have {expected.tolist()}")
    values = torch.from_numpy(chunk.flatten().to_numpy(zero_copy_only=False).copy())
    values = values.to(torch.int16) if not values.is_floating_point() else values
    result = values.new_full((*computed.shape, entries), fill)
    result[computed] = values.view(-1, entries)  # both are ordered by sequence, then by position
    return result


def counts_schema() -> pa.Schema:
    """Columns of a counts shard: one row is one MoE layer of one batch."""
    return pa.schema([("batch", pa.int32()), ("layer", pa.int32()), ("counts", pa.list_(pa.int64()))])


def counts_table(first: int, loads: IntArray) -> pa.Table:
    """Converts loads `[steps, L, E]` to a table; the first step is batch number `first`."""
    steps, layers, _ = loads.shape
    columns = {
        "batch": np.repeat(np.arange(first, first + steps), layers),
        "layer": np.tile(np.arange(layers), steps),
        "counts": list(loads.reshape(steps * layers, -1)),
    }
    return pa.table(columns, schema=counts_schema())
