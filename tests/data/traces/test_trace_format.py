"""The queries in docs/trace-format.md run as they stand and agree with the project's own reader."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data.models.layout import MoELayout
from data.traces.store import open_trace, write_about, write_shard
from data.traces.trace import PADDING, RouterTrace, pad_tokens

QUERIES = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[3] / "docs" / "trace-format.md").read_text(), re.S)
LAYOUT = MoELayout("m", "", (("encoder", 1), ("decoder", 1)), 8, 3, 32, 48, 400)


@pytest.fixture
def stored(tmp_path):
    rng = np.random.default_rng(0)
    shards = []
    for number in range(4):
        tokens = pad_tokens([rng.integers(0, 400, size) for size in (9, 30, 14)], pad=0)
        ids = torch.from_numpy(rng.integers(0, 8, (1, *tokens.mask.shape)) ** 2 // 8).to(torch.int16)
        ids = ids.masked_fill(~tokens.mask, PADDING)[..., None]
        trace = RouterTrace(number, "text", "", ("news", "code", "news"), tokens, tokens, ids, ids)
        shards.append(write_shard(tmp_path / f"part-{number:05d}.parquet", [trace], LAYOUT))
    write_about(tmp_path, LAYOUT, shards, ["test"] * 4, "tokens")
    return open_trace(tmp_path)


def run(query: str, stored) -> dict:
    names = {"TRACE": str(stored.path), "CAPACITY": stored.layout.expert_capacity}
    exec(query, names)
    return names


def test_pyarrow_demand(stored):
    table = run(QUERIES[0], stored)["demand"]
    found = {(row["batch"], row["expert"]): row["count_all"] for row in table.to_pylist()}
    expected = np.stack([trace.demand(LAYOUT)[0] for trace in stored.traces()])
    assert found == {(n, e): int(count) for (n, e), count in np.ndenumerate(expected) if count}


def test_pandas_hottest_expert(stored):
    hottest = run(QUERIES[1], stored)["hottest"]
    seen: dict[str, Counter] = {"news": Counter(), "code": Counter()}
    for trace in stored.traces():
        for segment, row in zip(trace.segments, trace.experts[0, ..., 0].tolist(), strict=True):
            seen[segment].update(expert for expert in row if expert >= 0)
    assert hottest.to_dict() == {segment: counts.most_common(1)[0][0] for segment, counts in seen.items()}


def test_duckdb_load(stored):
    found = {(batch, expert): load for batch, expert, load in run(QUERIES[2], stored)["load"]}
    loads = stored.loads()[:, 0]
    assert loads.sum() < sum(trace.demand(LAYOUT)[0].sum() for trace in stored.traces()), (
        "the case must drop some tokens"
    )
    assert found == {(n, e): int(load) for (n, e), load in np.ndenumerate(loads) if load}
