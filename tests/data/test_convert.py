"""A converted recording is a trace of the same counts."""

import json

import numpy as np
import pytest

import data.convert
from data.convert import convert
from data.files import whole_folder
from data.traces.store import open_trace

COUNTS = np.random.default_rng(0).integers(0, 50, (5, 3, 8))


def test_a_converted_trace_gives_its_counts_back(tmp_path, monkeypatch):
    monkeypatch.setattr(data.convert, "SHARD_STEPS", 2)
    np.save(tmp_path / "other-model.npy", COUNTS)
    convert(tmp_path / "other-model.npy", tmp_path / "trace")
    stored = open_trace(tmp_path / "trace")
    assert np.array_equal(stored.loads(), COUNTS)
    assert (stored.layout.model_id, stored.layout.num_layers, stored.num_batches) == ("other-model", 3, 5)
    with pytest.raises(ValueError, match="exists already"):
        convert(tmp_path / "other-model.npy", tmp_path / "trace")


def test_a_folder_that_another_process_writes_meanwhile_is_kept(tmp_path):
    with pytest.raises(ValueError, match="out exists already"), whole_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_recording_that_cannot_be_read_leaves_no_folder(tmp_path):
    np.save(tmp_path / "flat.npy", COUNTS[0])
    with pytest.raises(ValueError, match=r"flat.npy has shape \(3, 8\)"):
        convert(tmp_path / "flat.npy", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_steps_without_tokens_are_no_part_of_the_trace(tmp_path, caplog):
    np.save(tmp_path / "ring.npy", np.concatenate([COUNTS, np.zeros((95, 3, 8), int)]))
    stored = convert(tmp_path / "ring.npy", tmp_path / "trace")
    assert np.array_equal(stored.loads(), COUNTS)
    assert "95 of 100 steps hold no tokens and are left out" in caplog.text


def test_a_folder_of_recordings_becomes_one_trace_in_order_of_names(tmp_path, monkeypatch):
    monkeypatch.setattr(data.convert, "SHARD_STEPS", 4)
    parts = tmp_path / "parts"
    parts.mkdir()
    for number, steps in zip((1, 2, 10), np.split(COUNTS, [1, 4]), strict=True):
        np.save(parts / f"part{number}.npy", steps)
    stored = convert(parts, tmp_path / "trace")
    assert np.array_equal(stored.loads(), COUNTS)
    assert [shard["batches"] for shard in stored.about["shards"]] == [4, 1]
    np.save(parts / "part11.npy", COUNTS[:, :2])
    with pytest.raises(
        ValueError, match=r"part11.npy has \(2, 8\) layers and experts, the recordings before it \(3, 8\)"
    ):
        convert(parts, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_command(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "loads.npy", COUNTS)
    monkeypatch.setattr("sys.argv", ["convert", str(tmp_path / "loads.npy"), "--out", str(tmp_path / "trace")])
    data.convert.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["shape"] == [5, 3, 8]
