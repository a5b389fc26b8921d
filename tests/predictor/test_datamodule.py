"""What the network is fed: order, history, shares of the ranks, and refusals."""

import numpy as np
import pytest
import torch

from data.datamodule import RouterTraceModule
from data.traces.dataset import TraceSamples
from data.traces.store import open_trace
from tests.helpers.made_up_trace import make_layout, time_splits, write_trace


@pytest.fixture(scope="module")
def data(trace, layout):
    module = RouterTraceModule(trace, layout.model_id, window=5)
    module.setup()
    return module


def numbers(samples) -> list[int]:
    return [sample.trace.batch for sample in samples]


def shuffled(data, seed=0, epoch=0, rank=0, world=1) -> TraceSamples:
    return TraceSamples(data.trace, data.loads, data.sizes, "train", 5, lambda: epoch, 6, seed, rank, world)


def test_history_is_every_load_before_across_splits(data):
    stored = open_trace(data.path).loads()
    for sample in data.samples("test"):
        step = sample.trace.batch
        assert np.array_equal(sample.load, stored[step])
        assert np.array_equal(sample.history, stored[max(step - 5, 0) : step])


def test_splits_keep_their_order(data):
    assert numbers(data.samples("val")) == [*range(25, 31), *range(65, 71)]


def test_training_order_is_seeded_and_differs_by_epoch(data):
    first = numbers(shuffled(data))
    assert sorted(first) == numbers(data.samples("train"))
    assert first == numbers(shuffled(data))
    assert first != numbers(shuffled(data, epoch=1))
    assert first != numbers(shuffled(data, seed=1))


def test_batches_are_cut_without_loss(data):
    cut = TraceSamples(data.trace, data.loads, data.sizes, "train", 5, lambda: 0, sequences=2)
    parts = list(cut)
    assert len(parts) == len(cut) == 48 * 3
    assert {len(sample.trace.segments) for sample in parts} == {2}
    total = sum(sample.load for sample in parts)
    assert np.array_equal(total, data.loads[[step for step, name in enumerate(data.splits) if name == "train"]].sum(0))
    assert all(sample.trace.tokens.mask.any(0).all() for sample in parts)


def test_ranks_share_the_batches_evenly(data):
    parts = [numbers(shuffled(data, rank=rank, world=5)) for rank in range(5)]
    assert {len(part) for part in parts} == {9} == {len(shuffled(data, world=5))}
    assert len({number for part in parts for number in part}) == 45


def test_a_trace_of_another_revision_is_refused(trace, layout):
    with pytest.raises(
        ValueError, match=f"is a trace of revision '' of {layout.model_id}, the configuration names 'v2'"
    ):
        RouterTraceModule(trace, layout.model_id, revision="v2").setup()


def test_a_missing_trace_is_collected_from_the_revision(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr("data.datamodule.collect", asked.update)
    RouterTraceModule(tmp_path / "t", "owner/name", revision="v2").prepare_data()
    assert (asked["model"], asked["revision"]) == ("owner/name", "v2")


def test_a_trace_of_another_model_is_refused(trace, layout):
    with pytest.raises(ValueError, match=f"is a trace of {layout.model_id}, the configuration names other"):
        RouterTraceModule(trace, "other").setup()


@pytest.mark.parametrize(("splits", "lacks"), [(["train"], "val"), (time_splits(3, 0, 2), "val"), (["test"], "train")])
def test_an_empty_split_is_refused(tmp_path, splits, lacks):
    folder = write_trace(tmp_path / "t", make_layout("m"), splits)
    with pytest.raises(ValueError, match=f"has {len(splits)} batches, none of them in the {lacks} split"):
        RouterTraceModule(folder, "m").setup()


def test_a_sample_moves_to_a_device_whole(data, monkeypatch):
    sample, seen, real = next(iter(data.samples("val"))), [], torch.Tensor.to

    def spy(tensor, *args, **settings):
        seen.append(settings["non_blocking"])
        return real(tensor, *args, **settings)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    for waits in (True, False):
        seen.clear()
        moved = sample.to(torch.device("meta"), non_blocking=not waits)
        trace = moved.trace
        tensors = [trace.tokens.input_ids, trace.tokens.mask, trace.decoder_tokens.input_ids, trace.decoder_tokens.mask]
        tensors += [trace.experts, trace.decoder_experts, moved.load, moved.history]
        assert all(tensor.is_meta for tensor in tensors)
        assert seen == [not waits] * len(tensors)
        assert trace.tokens.mask.dtype == torch.bool
    assert sample.trace.segments == trace.segments
