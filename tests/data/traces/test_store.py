"""A trace comes back from disk as it was, and damage is refused by name."""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.files import sha256
from data.models.layout import MoELayout
from data.traces.dataset import sequence_loads
from data.traces.store import open_trace, write_about, write_counts_shard, write_shard
from data.traces.trace import PADDING, RouterTrace, pad_tokens

LAYOUT = MoELayout("m", "", (("encoder", 1), ("decoder", 1)), 8, 6, 32, 48, 400)


def trace(batch: int, top: int = 0) -> RouterTrace:
    rng = np.random.default_rng(batch)
    tokens = pad_tokens([rng.integers(0, 400, size) for size in (5, 30, 1)], pad=0)
    decoder = pad_tokens([rng.integers(0, 400, size) for size in (3, 2, 4)], pad=0)

    def experts(batch_tokens):
        ids = torch.from_numpy(rng.integers(0, 8, (1, *batch_tokens.mask.shape, 1))).to(torch.int16)
        return ids.masked_fill(~batch_tokens.mask[..., None], PADDING)

    segments = ("news", "code", "news")
    plain = RouterTrace(batch, "steady", "train", segments, tokens, decoder, experts(tokens), experts(decoder))
    if not top:
        return plain
    likely = torch.from_numpy(rng.random((1, *tokens.mask.shape, 8))).topk(top)
    likely_p = likely.values.half().masked_fill(~tokens.mask[..., None], 0)
    likely_experts = likely.indices.to(torch.int16).masked_fill(~tokens.mask[..., None], 0)
    return dataclasses.replace(plain, top_experts=likely_experts, top_probabilities=likely_p)


@pytest.fixture
def folder(tmp_path):
    shards = []
    for index, batches in enumerate(([0, 1, 2], [3])):
        file = f"part-{index:05d}.parquet"
        shards.append(write_shard(tmp_path / file, [trace(batch) for batch in batches], LAYOUT))
    write_about(tmp_path, LAYOUT, shards, ["train"] * 4, "tokens")
    return tmp_path


def edit(folder, **changes):
    about = json.loads((folder / "trace.json").read_text()) | changes
    (folder / "trace.json").write_text(json.dumps(about))


def test_round_trip(folder):
    stored = open_trace(folder)
    assert stored.layout == LAYOUT
    assert stored.num_batches == 4
    for got, expected in zip(stored.traces(), map(trace, range(4)), strict=True):
        assert (got.batch, got.phase, got.split, got.segments) == (
            expected.batch, expected.phase, expected.split, expected.segments,
        )  # fmt: skip
        assert torch.equal(got.tokens.mask, expected.tokens.mask)
        assert torch.equal(got.tokens.input_ids, expected.tokens.input_ids)
        assert torch.equal(got.experts, expected.experts)
        assert torch.equal(got.decoder_experts, expected.decoder_experts)
    assert np.array_equal(stored.loads()[2], trace(2).load(LAYOUT))


def test_format_1_is_still_read():
    """The folder was written by the code of format 1 (commit e550c4f); loads.json holds what that code read from it."""
    folder = Path(__file__).parent / "fixtures" / "v1"
    expected, stored = json.loads((folder / "loads.json").read_text()), open_trace(folder)
    assert stored.about["format_version"] == 1
    assert stored.loads().tolist() == expected["loads"]
    for number, trace in enumerate(stored.traces()):
        assert trace.experts[..., 0].tolist() == expected["encoder_experts"][number]
        assert trace.decoder_experts[..., 0].tolist() == expected["decoder_experts"][number]
        assert trace.top_experts.tolist() == expected["encoder_top_experts"][number]
        assert trace.tokens.context is None
        assert trace.requests is None


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([8, 300]), st.booleans(), st.booleans(),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=5),
)  # fmt: skip
def test_any_trace_comes_back(seed, top_k, num_experts, named, causal, sizes):
    rng = np.random.default_rng(seed)
    layers = (("decoder", 0), ("decoder", 2)) if causal else (("encoder", 1), ("decoder", 1))
    layout = MoELayout(
        "m", "", layers, num_experts, None, 16, 8, 400, family="f", experts_per_token=top_k, causal=causal
    )
    tokens = pad_tokens([rng.integers(0, 400, before + own) for before, own in sizes], 0)
    before = torch.arange(tokens.mask.shape[1]) < torch.tensor([[before] for before, _ in sizes])
    requests = torch.from_numpy(rng.integers(0, 2**40, len(sizes))) if named else None
    tokens = dataclasses.replace(tokens, context=before if before.any() else None, requests=requests)
    decoder = pad_tokens([rng.integers(0, 400, 0 if causal else own) for _, own in sizes], 0)

    def experts(layers, computed):
        shape = (layers, *computed.shape, num_experts)
        chosen = torch.from_numpy(rng.random(shape)).topk(top_k).indices.to(torch.int16)
        return chosen.masked_fill(~computed[..., None], PADDING)

    routes = experts(layout.num_input_layers, tokens.computed), experts(0 if causal else 1, decoder.mask)
    made = RouterTrace(0, "p", "test", ("s",) * len(sizes), tokens, decoder, *routes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_about(folder, layout, [write_shard(folder / "p.parquet", [made], layout)], ["test"], "tokens")
        (got,) = open_trace(folder).traces()
    assert torch.equal(got.tokens.input_ids, tokens.input_ids)
    assert torch.equal(got.tokens.computed, tokens.computed)
    assert (got.requests is None) == (requests is None)
    assert requests is None or torch.equal(got.requests, requests)
    assert torch.equal(got.experts, made.experts)
    assert torch.equal(got.decoder_experts, made.decoder_experts)
    assert np.array_equal(got.load(layout), made.load(layout))
    assert np.array_equal(got.load(layout), sequence_loads(got, layout).sum(0).numpy())
    assert got.load(layout)[0].sum() == top_k * tokens.num_tokens


def test_routes_that_do_not_match_the_tokens_are_refused(folder):
    path = folder / "part-00001.parquet"
    table = pq.read_table(path)
    short = pa.array([row[1:] for row in table["encoder_1"].to_pylist()], table.schema.field("encoder_1").type)
    pq.write_table(table.set_column(table.schema.get_field_index("encoder_1"), "encoder_1", short), path)
    shards = json.loads((folder / "trace.json").read_text())["shards"]
    edit(folder, shards=[shards[0], shards[1] | {"sha256": sha256(path)}])
    with pytest.raises(ValueError, match=r"column encoder_1 holds \[4, 29, 0\] entries, the tokens have \[5, 30, 1\]"):
        list(open_trace(folder).traces())


def test_likeliest_experts_come_back_too(tmp_path):
    shard = write_shard(tmp_path / "part-00000.parquet", [trace(0, top=3), trace(1, top=3)], LAYOUT)
    write_about(tmp_path, LAYOUT, [shard], ["train"] * 2, "tokens", top=3)
    for got, expected in zip(open_trace(tmp_path).traces(), (trace(0, top=3), trace(1, top=3)), strict=True):
        assert torch.equal(got.top_experts, expected.top_experts)
        assert torch.equal(got.top_probabilities, expected.top_probabilities)


def test_missing_values_are_refused(folder):
    path = folder / "part-00001.parquet"
    table = pq.read_table(path)
    holes = pa.array([[None, *row[1:]] for row in table["tokens"].to_pylist()], table.schema.field("tokens").type)
    pq.write_table(table.set_column(table.schema.get_field_index("tokens"), "tokens", holes), path)
    shards = json.loads((folder / "trace.json").read_text())["shards"]
    edit(folder, shards=[shards[0], shards[1] | {"sha256": sha256(path)}])
    with pytest.raises(ValueError, match=r"part-00001\.parquet: column tokens has missing values"):
        list(open_trace(folder).traces())


def test_plain_pyarrow_reads_expert_ids_as_bytes(folder):
    table = pq.read_table(folder / "part-00000.parquet")
    assert str(table.schema.field("encoder_1").type) == "list<element: uint8>"
    assert len(table["encoder_1"][1]) == len(table["tokens"][1]) == 30


def test_damage_is_refused_by_name(folder):
    shard = folder / "part-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"part-00001.parquet has sha256 .* it was cut short, edited"):
        list(open_trace(folder).traces())
    shard.unlink()
    with pytest.raises(ValueError, match=r"part-00001.parquet is missing; collect the trace again"):
        list(open_trace(folder).traces())


def test_other_formats_are_refused(folder, tmp_path_factory):
    edit(folder, format_version=3)
    with pytest.raises(ValueError, match="format version 3; this version reads 1 and 2"):
        open_trace(folder)
    (folder / "trace.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        open_trace(folder)
    with pytest.raises(ValueError, match="is not a folder; expected a trace"):
        open_trace(folder / "nowhere")
    with pytest.raises(ValueError, match=r"trace.json does not exist"):
        open_trace(tmp_path_factory.mktemp("empty"))


def test_expert_out_of_range_is_refused(folder):
    edit(folder, layout=MoELayout("m", "", LAYOUT.layers, 4, 6, 32, 48, 400).to_json())
    with pytest.raises(ValueError, match=r"holds expert 7; the model has 4"):
        list(open_trace(folder).traces())


def test_more_than_256_experts_take_two_bytes(tmp_path):
    wide = dataclasses.replace(LAYOUT, num_experts=2048)
    big = dataclasses.replace(trace(0), experts=trace(0).experts * 200)
    big = dataclasses.replace(big, experts=big.experts.masked_fill(~big.tokens.mask[..., None], PADDING))
    write_about(tmp_path, wide, [write_shard(tmp_path / "p.parquet", [big], wide)], ["test"], "tokens")
    assert torch.equal(next(open_trace(tmp_path).traces()).experts, big.experts)


def test_counts_without_tokens(tmp_path):
    loads = np.random.default_rng(0).integers(0, 100, (7, 2, 8))
    shards = [write_counts_shard(tmp_path / f"{first}.parquet", first, loads[first : first + 4]) for first in (0, 4)]
    write_about(tmp_path, LAYOUT, shards, ["test"] * 7, "counts")
    stored = open_trace(tmp_path)
    assert np.array_equal(stored.loads(), loads)
    with pytest.raises(ValueError, match="holds counts only, without tokens"):
        next(stored.traces())


def test_a_failed_write_leaves_nothing(tmp_path):
    wrong = dataclasses.replace(LAYOUT, layers=(("encoder", 1), ("encoder", 3), ("decoder", 1)))
    with pytest.raises(ValueError, match="shorter"):
        write_shard(tmp_path / "part.parquet", [trace(0)], wrong)
    assert list(tmp_path.iterdir()) == []
