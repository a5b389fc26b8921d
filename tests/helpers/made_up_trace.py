"""A small made-up trace for tests: experts are a function of the token, its right neighbour and the topic."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data.files import sha256, write_json
from data.models.layout import MoELayout
from data.traces.recordings import TRACE_JSON
from data.traces.store import FORMAT_VERSION, write_shard
from data.traces.trace import PADDING, RouterTrace, pad_tokens

VOCABULARY, EXPERTS, WIDTH = 60, 8, 16
PHASES = ("steady", "every_1")


def make_layout(model_id: str, routers: str = "r") -> MoELayout:
    return MoELayout(
        model_id, "", (("encoder", 1), ("encoder", 3), ("decoder", 1)), EXPERTS, 6, WIDTH, 8, VOCABULARY, routers
    )


def make_batch(number: int, phase: str, split: str, rng: np.random.Generator) -> RouterTrace:
    topic = number % 3 if phase == "every_1" else 0
    rows = [rng.integers(topic * 20, topic * 20 + 20, rng.integers(4, 14)) for _ in range(6)]
    tokens, decoder = pad_tokens(rows, 0), pad_tokens([row[:3] for row in rows], 0)
    ids = tokens.input_ids
    neighbour = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    first = (ids % EXPERTS).masked_fill(~tokens.mask, PADDING)
    second = ((ids + neighbour % 2) % EXPERTS).masked_fill(~tokens.mask, PADDING)
    third = ((decoder.input_ids // 20) * 2 + decoder.input_ids % 2).masked_fill(~decoder.mask, PADDING)
    return RouterTrace(
        number, phase, split, ("topic",) * 6, tokens, decoder,
        torch.stack([first, second]).short()[..., None], third[None].short()[..., None],
    )  # fmt: skip


def write_trace(folder: Path, layout: MoELayout, splits: list[str], shard: int = 8, repeating: bool = False) -> Path:
    """Writes a trace of a model with the made-up one's layers or the first of each stack; `repeating` in one batch."""
    half, rng = max(len(splits) // 2, 1), np.random.default_rng(0)
    traces = []
    for number, split in enumerate(splits):
        phase = PHASES[0 if repeating else min(number // half, 1)]
        batch = make_batch(number, phase, split, np.random.default_rng(0) if repeating else rng)
        traces.append(replace(batch, experts=batch.experts[: layout.num_input_layers]))
    shards = []
    for start in range(0, len(traces), shard):
        path = folder / f"part-{start:05d}.parquet"
        write_shard(path, traces[start : start + shard], layout)
        shards.append({"file": path.name, "batches": len(traces[start : start + shard]), "sha256": sha256(path)})
    about = {"format_version": FORMAT_VERSION, "layout": layout.to_json(), "granularity": "tokens", "decode": "teacher"}
    runs = [[split, number, number + 1] for number, split in enumerate(splits)]
    write_json(folder / TRACE_JSON, about | {"splits": runs, "shards": shards})
    return folder


def time_splits(train: int, val: int, test: int) -> list[str]:
    """Splits of two phases, each divided in time with gaps."""
    return (["train"] * train + ["gap"] + ["val"] * val + ["gap"] + ["test"] * test) * 2
