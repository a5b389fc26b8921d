"""A trace on disk: Parquet shards and trace.json. The only file that knows the format (see docs/trace-format.md).

One row is one sequence; one column holds the expert of each of its tokens in one MoE layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from data.files import read_json, sha256, whole_file
from data.layout import MoELayout
from data.trace import PADDING, IntArray, RouterTrace, TokenBatch, pad_tokens

FORMAT_VERSION = 1
TRACE_JSON = "trace.json"


def schema(layout: MoELayout) -> pa.Schema:
    """Columns of a shard: where a sequence ran, its tokens, and one column of expert ids for each MoE layer."""
    expert = pa.uint8() if layout.num_experts <= 256 else pa.int16()
    fields = [("batch", pa.int32()), ("phase", pa.string()), ("split", pa.string()), ("segment", pa.string())]
    fields += [("tokens", pa.list_(pa.int32())), ("decoder_tokens", pa.list_(pa.int32()))]
    return pa.schema(fields + [(name, pa.list_(expert)) for name in layout.layer_names])


def _ragged(values: Tensor, mask: Tensor) -> list[np.ndarray[Any, Any]]:
    return [row[keep].numpy() for row, keep in zip(values, mask, strict=True)]


def write_shard(path: Path, traces: list[RouterTrace], layout: MoELayout) -> None:
    """Writes some batches as one Parquet file, whole or not at all."""
    columns: dict[str, list[Any]] = {name: [] for name in schema(layout).names}
    for trace in traces:
        size = len(trace.segments)
        columns["batch"] += [trace.batch] * size
        columns["phase"] += [trace.phase] * size
        columns["split"] += [trace.split] * size
        columns["segment"] += trace.segments
        columns["tokens"] += _ragged(trace.tokens.input_ids, trace.tokens.mask)
        columns["decoder_tokens"] += _ragged(trace.decoder_tokens.input_ids, trace.decoder_tokens.mask)
        masks = [trace.tokens.mask] * len(trace.encoder_experts) + [trace.decoder_tokens.mask] * len(
            trace.decoder_experts
        )
        experts = [*trace.encoder_experts, *trace.decoder_experts]
        for name, ids, mask in zip(layout.layer_names, experts, masks, strict=True):
            columns[name] += _ragged(ids, mask)
    with whole_file(path) as aside:
        pq.write_table(pa.table(columns, schema=schema(layout)), aside, compression="zstd")


def _column(rows: pa.Table, name: str) -> list[IntArray]:
    """A list column as one numpy array a row."""
    chunk = rows[name].combine_chunks()
    values, offsets = chunk.flatten().to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
    return np.split(values, (offsets - offsets[0])[1:-1])


def _batch(rows: pa.Table, layout: MoELayout) -> RouterTrace:
    tokens = pad_tokens(_column(rows, "tokens"), pad=0)
    decoder = pad_tokens(_column(rows, "decoder_tokens"), pad=0)
    experts = [pad_tokens(_column(rows, name), pad=PADDING).input_ids.to(torch.int16) for name in layout.layer_names]
    for name, ids in zip(layout.layer_names, experts, strict=True):
        if ids.numel() and int(ids.max()) >= layout.num_experts:
            raise ValueError(f"{name} holds expert {int(ids.max())}; the model has {layout.num_experts}")
    split = layout.num_encoder_layers
    empty = torch.zeros((0, *decoder.input_ids.shape), dtype=torch.int16)
    return RouterTrace(
        batch=rows["batch"][0].as_py(),
        phase=rows["phase"][0].as_py(),
        split=rows["split"][0].as_py(),
        segments=tuple(rows["segment"].to_pylist()),
        tokens=tokens,
        decoder_tokens=decoder,
        encoder_experts=torch.stack(experts[:split]),
        decoder_experts=torch.stack(experts[split:]) if experts[split:] else empty,
    )


@dataclass(frozen=True)
class StoredTrace:
    """A trace folder that was opened: its description checked, its shards not read yet.

    Attributes:
        path: The folder.
        layout: The model that was traced.
        about: trace.json as it stands.
    """

    path: Path
    layout: MoELayout
    about: dict[str, Any]

    @property
    def num_batches(self) -> int:
        """Batches in all shards."""
        return sum(shard["batches"] for shard in self.about["shards"])

    def traces(self) -> Iterator[RouterTrace]:
        """Yields the batches in order, one shard in memory at a time.

        Raises:
            ValueError: On a shard that is missing, damaged, or not this trace's; the message names it.
        """
        for shard in self.about["shards"]:
            path = self.path / shard["file"]
            if not path.exists():
                raise ValueError(f"{path} is missing; collect the trace again")
            if (digest := sha256(path)) != shard["sha256"]:
                raise ValueError(
                    f"{path} has sha256 {digest[:12]}, trace.json says {shard['sha256'][:12]}; damaged or edited"
                )
            table = pq.read_table(path)
            if table.schema != schema(self.layout):
                raise ValueError(f"{path} has columns {table.schema.names}, expected {schema(self.layout).names}")
            numbers = table["batch"].to_numpy()
            edges = np.flatnonzero(np.diff(numbers)) + 1
            for start, stop in zip([0, *edges], [*edges, len(numbers)], strict=True):
                try:
                    yield _batch(table.slice(start, stop - start), self.layout)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from None

    def batches(self) -> Iterator[TokenBatch]:
        """Yields the encoder tokens of each batch."""
        return (trace.tokens for trace in self.traces())

    def loads(self) -> IntArray:
        """Loads of all batches, `[steps, L, E]`."""
        return np.stack([trace.load(self.layout) for trace in self.traces()])


def open_trace(path: Path) -> StoredTrace:
    """Opens a trace folder.

    Raises:
        ValueError: If there is no whole trace of a format this version reads.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; expected a trace written by `python -m data.collect`")
    about = read_json(path / TRACE_JSON)
    if about.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path / TRACE_JSON} has format version {about.get('format_version')}; this version reads {FORMAT_VERSION}"
        )
    missing = {"layout", "shards"} - about.keys()
    if missing:
        raise ValueError(f"{path / TRACE_JSON} lacks {sorted(missing)}")
    return StoredTrace(path, MoELayout.from_json(about["layout"]), about)
