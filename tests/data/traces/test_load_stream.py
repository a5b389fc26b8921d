"""A recording's steps, one after the other: the same as in memory, without being there."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from data.models.layout import MoELayout
from data.traces.load_stream import as_stream, open_stream
from data.traces.store import open_trace, write_about, write_counts_shard

LOADS = np.random.default_rng(0).integers(0, 50, (40, 3, 8))
LOADS[7:12], LOADS[:, 1], LOADS[20, 2] = 0, 0, 0


def write(folder, loads, steps=16):
    layers, experts = loads.shape[1:]
    layout = MoELayout("other", "", tuple(("decoder", layer) for layer in range(layers)), experts, 0, 0, 0, 0)
    starts = range(0, len(loads), steps)
    shards = [write_counts_shard(folder / f"{first}.parquet", first, loads[first : first + steps]) for first in starts]
    write_about(folder, layout, shards, ["test"] * len(loads), "counts")
    return folder


@pytest.mark.parametrize("form", ["trace", "array"])
def test_steps_and_what_is_known_of_them(form, tmp_path, caplog):
    stream = as_stream(write(tmp_path, LOADS) if form == "trace" else LOADS)
    kept = np.delete(LOADS, range(7, 12), axis=0)
    for _ in range(2):
        assert np.array_equal(np.stack([step.load for step in stream.steps()]), kept)
    assert (stream.num_steps, stream.empty_steps, stream.num_layers, stream.num_experts) == (35, 5, 3, 8)
    assert stream.layers.tolist() == [0, 2]
    tokens = kept.sum(-1)
    assert stream.mean_tokens == pytest.approx(tokens[tokens > 0].mean())
    assert stream.most_tokens == tokens.max()
    assert caplog.text.count("5 of 40 steps hold no tokens and are left out") == 1


def test_a_trace_is_not_in_memory(tmp_path):
    """24 shards of 2 MiB each; at most a few of them are there at once."""
    rng = np.random.default_rng(0)
    write(tmp_path, rng.integers(0, 9, (24 * 64, 16, 256)), steps=64)
    shard, before = 64 * 16 * 256 * 8, pa.total_allocated_bytes()
    most = 0
    tracemalloc.start()
    for _ in open_stream(tmp_path).steps():
        most = max(most, pa.total_allocated_bytes() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most + peak < 8 * shard


def test_a_damaged_shard_is_named_and_nothing_without_tokens_is_a_stream(tmp_path):
    folder = write(tmp_path, LOADS)
    path = tmp_path / "16.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"16.parquet has sha256 .* cut short"):
        open_stream(folder)
    assert open_trace(folder).num_batches == 40
    with pytest.raises(ValueError, match="array holds no tokens in any of its 4 steps"):
        as_stream(np.zeros((4, 1, 8), int))
