"""Requests are served whole and in order, and come back from the trace that their steps make."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data.convert
from data.convert import convert
from data.traces.requests import RecordedRequest, ordered, requests_of, serve, step_trace
from data.traces.store import open_trace
from data.traces.token_recording import divided, read_token_recording
from data.traces.trace import UNKNOWN
from tests.helpers.made_up_requests import EXPERTS, LAYERS, TOP_K, VOCABULARY, arrays, write_recording
from tests.helpers.made_up_trace import make_layout, time_splits, write_trace


def request(number: int, routed: int, before: int = 0, segment: str = "s") -> RecordedRequest:
    rng = np.random.default_rng(number)
    experts = rng.integers(0, EXPERTS, (routed, LAYERS, TOP_K)).astype(np.int16)
    return RecordedRequest(number, segment, "prefill", "test", rng.integers(0, 40, before + routed), before, experts)


def test_the_example_of_the_docstring():
    steps = list(serve([request(0, 3), request(1, 5)], slots=2, chunk=2))
    assert [[stop - start for _, start, stop in step] for step in steps] == [[2, 2], [1, 2], [1]]


@given(st.lists(st.integers(0, 30), max_size=9), st.integers(1, 5), st.integers(1, 8))
def test_every_token_is_computed_once_and_in_order(lengths, slots, chunk):
    requests = [request(number, length) for number, length in enumerate(lengths)]
    done = dict.fromkeys(range(len(lengths)), 0)
    for step in serve(requests, slots, chunk):
        assert 0 < len(step) <= slots
        assert len({piece.request.number for piece in step}) == len(step)
        for piece in step:
            assert piece.start == done[piece.request.number]
            assert 0 < piece.stop - piece.start <= chunk
            done[piece.request.number] = piece.stop
    assert list(done.values()) == lengths


def test_a_step_reads_context_and_routes_its_own_tokens():
    one, other = request(1, 6, before=3), request(2, 2)
    steps = list(serve([one, other], slots=2, chunk=2))
    trace = step_trace(7, steps[1], context=4)
    assert trace.requests.tolist() == [1]
    assert trace.tokens.input_ids[0].tolist() == one.tokens[1:7].tolist()
    assert trace.tokens.computed[0].tolist() == [False] * 4 + [True] * 2
    assert np.array_equal(trace.experts[:, 0, 4:], one.experts[2:4].transpose(1, 0, 2))
    assert (trace.experts[:, 0, :4] == -1).all()
    hidden = trace.tokens.unwritten()
    assert hidden.input_ids[0].tolist() == [*one.tokens[1:5].tolist(), UNKNOWN, UNKNOWN]
    assert (hidden.num_tokens, trace.tokens.num_tokens) == (2, 2)


def test_orders():
    requests = [request(number, 3, segment=name) for number, name in enumerate("abab")]
    assert [one.number for one in ordered(requests, "subject")] == [0, 2, 1, 3]
    assert sorted(one.number for one in ordered(requests, "shuffled")) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="order is 'random', expected subject or shuffled"):
        ordered(requests, "random")


def test_a_converted_recording_gives_its_requests_back(tmp_path):
    path = write_recording(tmp_path / "r.npz")
    stored = convert(path, tmp_path / "trace", slots=3, chunk=16, context=1000)
    recorded, layout = read_token_recording(path)
    assert stored.layout == layout
    assert (layout.num_experts, layout.experts_per_token, layout.vocab_size, layout.d_model) == (8, 2, VOCABULARY, 0)
    back = {one.number: one for one in requests_of(stored)}
    assert len(back) == len(recorded)
    for one in recorded:
        other, stop = back[one.number], one.first_routed + len(one.experts)
        assert (other.segment, other.first_routed) == (one.segment, one.first_routed)
        assert np.array_equal(other.tokens, one.tokens[:stop])
        assert np.array_equal(other.experts, one.experts)
    traces = list(stored.traces())
    assert all(len({back[number].split for number in trace.requests.tolist()}) == 1 for trace in traces)
    assert stored.loads().sum() == arrays()["experts"].size
    assert {trace.phase for trace in traces} == {"prefill", "unseen"}
    seen = {name for trace in traces if trace.split == "train" for name in trace.segments}
    assert seen.isdisjoint({name for trace in traces if trace.phase == "unseen" for name in trace.segments})


def test_splits_follow_time_within_a_subject():
    requests = [request(number, 2, segment=f"s{number // 5}") for number in range(30)]
    parts = divided(requests)
    assert [one.split for one in parts if one.segment == parts[0].segment] == ["train"] * 3 + ["val", "test"]
    assert [one.phase for one in parts][-5:] == ["unseen"] * 5
    assert len(parts) == 30
    alone = divided([request(number, 2) for number in range(4)])
    assert {one.phase for one in alone} == {"prefill"}, "one subject alone is not held out"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routed": None}, "lacks routed; expected the arrays tokens, length"),
        ({"length": np.array([3, 4])}, r"tokens has shape \(\d+,\), expected \(7,\), as length says"),
        ({"experts": arrays()["experts"][:-1]}, r"experts has shape .* expected \[\d+, layers, experts of a token\]"),
        ({"experts": arrays()["experts"].astype(float)}, "experts holds float64, expected whole numbers"),
        ({"tokens": -arrays()["tokens"]}, "holds negative numbers"),
        ({"vocabulary": np.array(5)}, "holds token id 47, its vocabulary has 5"),
        ({"subject": np.arange(3)}, r"subject has shape \(3,\), expected a number in subjects for each of 48"),
        ({"first_routed": arrays()["length"]}, "r.npz: request 0 has .* tokens, but routes up to token"),
    ],
)
def test_a_recording_that_does_not_fit_together_is_refused(tmp_path, changes, message):
    path = write_recording(tmp_path / "r.npz", **changes)
    with pytest.raises(ValueError, match=message):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_request_without_routed_tokens_is_left_out_and_counted(tmp_path, caplog):
    found = arrays()
    first, routed = found["first_routed"].copy(), found["routed"].copy()
    dropped = int(routed[1])
    start = int(routed[0])
    routed[1] = 0
    experts = np.delete(found["experts"], slice(start, start + dropped), axis=0)
    path = write_recording(tmp_path / "r.npz", routed=routed, first_routed=first, experts=experts)
    requests, _ = read_token_recording(path)
    assert [request.number for request in requests] == [0, *range(2, len(routed))]
    assert f"r.npz: 1 of {len(routed)} requests have no routed token and are left out" in caplog.text


def test_command_and_its_mistakes(tmp_path, monkeypatch, capsys):
    path, out = write_recording(tmp_path / "r.npz"), tmp_path / "out"
    for option, message in (
        (["--slots", "0"], "slots is 0, expected 1 or more"),
        (["--context=-1"], "context is -1, expected 0 or more tokens"),
        (["--num_experts", "4"], "holds expert 7, the model has 4 experts; give 8 or more"),
    ):
        monkeypatch.setattr("sys.argv", ["convert", str(path), "--out", str(out), *option])
        with pytest.raises(SystemExit) as stop:
            data.convert.main()
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["convert", str(path), "--out", str(out), "--num_experts", "16"])
    data.convert.main()
    shape = json.loads(capsys.readouterr().out.splitlines()[-1])["shape"]
    assert shape == [open_trace(out).num_batches, LAYERS, 16]


def test_traces_without_requests_cannot_be_served(tmp_path):
    with pytest.raises(ValueError, match="is a trace of an encoder; only a decoder-only model's requests"):
        requests_of(open_trace(write_trace(tmp_path / "t", make_layout("m"), time_splits(2, 1, 1))))


def test_tokens_of_a_batch_are_cut_with_their_context():
    trace = step_trace(0, next(serve([request(0, 5, before=2), request(1, 9)], 2, 4)))
    row = trace.tokens.rows(torch.tensor([1]), 3)
    assert row.requests.tolist() == [1]
    assert row.computed.tolist() == [[True, True, True]]
