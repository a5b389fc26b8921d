"""Traces of decoder-only models: the routes are those that the experts modules were given, for prompts and steps."""

import json

import numpy as np
import pytest
import torch

import data.collect
from data.collect import collect
from data.models.model import load_model
from data.models.registered import moe_modules
from data.text.batching import BatchingConfig
from data.traces.router_tap import RouterTap
from data.traces.store import open_trace
from data.traces.text_tracer import TextTracer
from tests.conftest import TEXTS
from tests.helpers.small_qwen3 import write_qwen3

BATCHING = BatchingConfig(batches=4, smallest=2, largest=4, length=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, switch_folder):
    return write_qwen3(tmp_path_factory.mktemp("models") / "qwen3", switch_folder)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(text[: 40 + 13 * number] for number, text in enumerate(TEXTS)))
    return str(path)


def routed(model, ids) -> torch.Tensor:
    """Experts of one sequence without padding, `[L, T, K]`, seen by wrapping the experts modules by hand."""
    seen, layers = [], moe_modules(model)
    handles = [
        layer.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1].clone())) for layer in layers
    ]
    with torch.inference_mode():
        model(input_ids=torch.as_tensor(ids)[None])
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def test_every_token_of_the_text_and_no_padding_is_logged(folder, text, tmp_path):
    stored = collect(str(folder), tmp_path / "trace", text, batching=BATCHING, top=3)
    model, seen = load_model(str(folder)).model, 0
    assert stored.about["format_version"] == 2
    for trace in stored.traces():
        assert trace.experts.shape == (2, *trace.tokens.mask.shape, 3)
        assert trace.decoder_experts.shape[0] == 0
        for row, mask in enumerate(trace.tokens.mask):
            alone = routed(model, trace.tokens.input_ids[row][mask])
            assert torch.equal(trace.experts[:, row, mask].long(), alone)
            assert (trace.experts[:, row, ~mask] == -1).all()
        assert torch.equal(trace.top_experts[:, trace.tokens.mask], trace.experts[:, trace.tokens.mask])
        assert trace.load(stored.layout).sum(-1).tolist() == [3 * trace.tokens.num_tokens] * 2
        assert trace.requests.tolist() == list(range(seen, seen + len(trace.segments)))
        seen += len(trace.segments)


def test_generated_steps_follow_their_prompts(folder, text, tmp_path):
    options = {"batching": BATCHING, "decode": "generate", "max_new_tokens": 4}
    stored = collect(str(folder), tmp_path / "trace", text, **options)
    model, traces = load_model(str(folder)).model, list(stored.traces())
    assert [trace.phase for trace in traces] == ["text", "decode", "decode", "decode"] * (len(traces) // 4)
    assert len(stored.splits) == len(traces) == stored.num_batches
    assert [trace.batch for trace in traces] == list(range(len(traces)))
    for prompt, *steps in (traces[start : start + 4] for start in range(0, len(traces), 4)):
        for row, mask in enumerate(prompt.tokens.mask):
            written = prompt.tokens.input_ids[row][mask].tolist()
            assert torch.equal(prompt.experts[:, row, mask].long(), routed(model, written))
            for step in steps:
                real = step.tokens.mask[row]
                assert step.tokens.input_ids[row][real].tolist()[:-1] == written
                written = step.tokens.input_ids[row][real].tolist()
                assert torch.equal(step.experts[:, row, len(written) - 1].long(), routed(model, written)[:, -1])
                assert step.upcoming.input_ids[row][real].tolist() == [*written[:-1], -1]
        assert all(torch.equal(step.requests, prompt.requests) for step in steps)
        assert all(step.tokens.num_tokens == len(prompt.segments) for step in steps)


def test_an_interrupted_trace_of_steps_resumes_to_the_same_bytes(folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(data.collect, "SHARD_BATCHES", 2)
    options = {"batching": BATCHING, "decode": "generate", "max_new_tokens": 3}
    whole = collect(str(folder), tmp_path / "whole", text, **options)
    real, calls = TextTracer.traces, []

    def interrupted(self, batch):
        calls.append(batch.number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(TextTracer, "traces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(str(folder), tmp_path / "cut", text, **options)
    cut = collect(str(folder), tmp_path / "cut", text, **options)
    assert calls == [0, 1, 2, 3, 2, 3]
    assert {path.name: path.read_bytes() for path in whole.path.iterdir()} == {
        path.name: path.read_bytes() for path in cut.path.iterdir()
    }


def test_context_of_a_long_text_is_cut(folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr("data.traces.text_tracer.CONTEXT", 5)
    stored = collect(str(folder), tmp_path / "trace", text, batching=BATCHING, decode="generate", max_new_tokens=3)
    prompt, first, second = list(stored.traces())[:3]
    assert first.tokens.mask.sum(1).tolist() == second.tokens.mask.sum(1).tolist() == [6] * len(prompt.segments)
    assert first.tokens.input_ids[0, :5].tolist() == prompt.tokens.input_ids[0][prompt.tokens.mask[0]][-5:].tolist()


def test_the_tap_changes_nothing_and_leaves_nothing_behind(folder):
    loaded = load_model(str(folder))
    ids = torch.arange(3, 33)[None]
    before = loaded.model(input_ids=ids).logits
    with RouterTap(loaded.model, loaded.layout) as tap:
        assert torch.equal(loaded.model(input_ids=ids).logits, before)
        calls = tap.take()
        assert [len(layer) for layer in calls] == [1, 1]
        assert calls[0][0].experts.shape == calls[0][0].probability.shape == (30, 3)
    loaded.model(input_ids=ids)
    assert tap.take() == [[], []]
    with pytest.raises(ValueError, match="top is 2, expected 0 or 3: the experts that qwen3_moe chooses"):
        RouterTap(loaded.model, loaded.layout, top=2)


def test_command(folder, text, tmp_path, monkeypatch, capsys):
    words = ["--model", str(folder), "--text", text, "--out", str(tmp_path / "t"), "--batching.batches", "3"]
    monkeypatch.setattr("sys.argv", ["collect", *words, "--batching.length", "24", "--top", "2"])
    with pytest.raises(SystemExit):
        data.collect.main()
    assert "top is 2, expected 0 or 3" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
    monkeypatch.setattr("sys.argv", ["collect", *words, "--batching.length", "24"])
    data.collect.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["batches"] == open_trace(tmp_path / "t").num_batches
    assert np.isfinite(open_trace(tmp_path / "t").loads()).all()
