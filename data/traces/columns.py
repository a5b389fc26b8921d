"""Arrow columns of a trace's shards: schemas, router traces and counts to tables, columns back to tensors."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data.arrays import IntArray
from data.models.layout import MoELayout
from data.traces.trace import RouterTrace, TokenBatch, pad_tokens

Ragged = list[np.ndarray[Any, Any]]


def sequence_schema(layout: MoELayout, top: int) -> pa.Schema:
    """Columns of one sequence: its batch, its tokens, and the expert ids of each MoE layer.

    With `top`, each MoE layer of the encoder has two more columns: likeliest experts and their probabilities.
    """
    expert = pa.uint8() if layout.num_experts <= 256 else pa.int16()
    fields = [("batch", pa.int32()), ("phase", pa.string()), ("segment", pa.string()), ("length", pa.int32())]
    fields += [("tokens", pa.list_(pa.int32())), ("decoder_tokens", pa.list_(pa.int32()))]
    fields += [(name, pa.list_(expert)) for name in layout.layer_names]
    if top:
        for name in layout.layer_names[: layout.num_input_layers]:
            fields += [(f"{name}_top", pa.list_(expert)), (f"{name}_top_probability", pa.list_(pa.float16()))]
    return pa.schema(fields)


def sequence_table(traces: list[RouterTrace], layout: MoELayout) -> pa.Table:
    """Converts batches to a table with one row per sequence; padding is left out."""
    top = traces[0].encoder_top_experts
    schema = sequence_schema(layout, 0 if top is None else top.shape[-1])
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for trace in traces:
        size = len(trace.segments)
        columns["batch"] += [trace.batch] * size
        columns["phase"] += [trace.phase] * size
        columns["segment"] += trace.segments
        columns["length"] += trace.tokens.mask.sum(1).tolist()
        columns["tokens"] += _ragged(trace.tokens.input_ids, trace.tokens)
        columns["decoder_tokens"] += _ragged(trace.decoder_tokens.input_ids, trace.decoder_tokens)
        for name, rows in zip(layout.layer_names, _layers(trace), strict=True):
            columns[name] += rows
        for name, experts, probabilities in _top_entries(trace, layout):
            columns[f"{name}_top"] += experts
            columns[f"{name}_top_probability"] += probabilities
    return pa.table(columns, schema=schema)


def _layers(trace: RouterTrace) -> list[Ragged]:
    encoder = [_ragged(layer, trace.tokens) for layer in trace.encoder_experts]
    return encoder + [_ragged(layer, trace.decoder_tokens) for layer in trace.decoder_experts]


def _top_entries(trace: RouterTrace, layout: MoELayout) -> Iterator[tuple[str, Ragged, Ragged]]:
    """Yields each encoder layer's name, likeliest experts, and their probabilities, token after token."""
    if trace.encoder_top_experts is None or trace.encoder_top_probabilities is None:
        return
    for name, *pair in zip(
        layout.layer_names, trace.encoder_top_experts, trace.encoder_top_probabilities, strict=False
    ):
        experts, probabilities = (_ragged(values, trace.tokens) for values in pair)
        yield name, experts, probabilities


def _ragged(values: Tensor, tokens: TokenBatch) -> Ragged:
    return [row[keep].flatten().numpy() for row, keep in zip(values, tokens.mask, strict=True)]


def tokens_column(rows: pa.Table, name: str, pad: int = 0) -> TokenBatch:
    """Reads a list column of one batch, right-padded to `[B, T]`."""
    chunk = rows[name].combine_chunks()
    if chunk.null_count or chunk.values.null_count:
        raise ValueError(f"column {name} has missing values; expected a number for every token")
    values, offsets = chunk.flatten().to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
    return pad_tokens(np.split(values, (offsets - offsets[0])[1:-1]), pad)


def entries_column(rows: pa.Table, name: str, tokens: TokenBatch, entries: int) -> Tensor:
    """Reads a list column with `entries` numbers per token of one batch, `[B, T, entries]`; 0 on padding."""
    values = torch.from_numpy(rows[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).copy())
    result = values.new_zeros((*tokens.mask.shape, entries))
    result[tokens.mask] = values.view(-1, entries)  # both are ordered by sequence, then by position
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
