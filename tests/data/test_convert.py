"""Load histories of other systems, in the formats they write, become the same counts."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import data.convert
from data.convert import convert, read_loads
from data.traces.store import open_trace

COUNTS = np.random.default_rng(0).integers(0, 50, (5, 3, 8))


def test_numpy_arrays(tmp_path):
    np.save(tmp_path / "a.npy", COUNTS.astype(np.uint16))
    np.savez_compressed(tmp_path / "a.npz", counts=COUNTS.astype(np.float32))
    assert np.array_equal(read_loads(tmp_path / "a.npy"), COUNTS)
    assert np.array_equal(read_loads(tmp_path / "a.npz"), COUNTS)


def test_sglang_stat(tmp_path):
    torch.save({"rank": 0, "logical_count": torch.from_numpy(COUNTS)}, tmp_path / "s.pt")
    assert np.array_equal(read_loads(tmp_path / "s.pt"), COUNTS)


def test_sglang_per_pass_sums_replicas_and_ranks(tmp_path):
    """Ten slots a layer: experts 2 and 5 have a second one, and one slot is empty; two ranks count half each."""
    phy2log = torch.tensor([[*range(8), 2, 5, -1]] * 3)
    for rank in (0, 1):
        records = []
        for number, counts in enumerate(torch.from_numpy(COUNTS)):
            half = counts // 2 if rank else counts - counts // 2
            physical = torch.zeros(3, 11, dtype=torch.int32)
            physical[:, :8] = half
            physical[:, 8], physical[:, 2] = half[:, 2] // 3, half[:, 2] - half[:, 2] // 3
            physical[:, 9], physical[:, 5] = half[:, 5], 0
            records.append(
                {
                    "forward_pass_id": 100 - number,
                    "rank": rank,
                    "gatherer_key": "primary",
                    "global_physical_count": physical,
                }
            )
        torch.save({"records": records, "last_physical_to_logical_map": phy2log}, tmp_path / f"recorder_{rank}.pt")
    assert np.array_equal(read_loads(tmp_path), COUNTS[::-1]), "passes come in the order of their numbers"


def test_tensorrt_llm_statistics(tmp_path):
    (tmp_path / "meta_info.json").write_text(json.dumps({"num_experts": 8}))
    for rank, half in enumerate((COUNTS // 2, COUNTS - COUNTS // 2)):
        tensors = {f"{10 + step}_{3 + layer}": half[step, layer] for step in range(5) for layer in range(3)}
        save_file(tensors, tmp_path / f"rank{rank}.safetensors")
    assert np.array_equal(read_loads(tmp_path), COUNTS)


def test_a_converted_trace_gives_its_counts_back(tmp_path, monkeypatch):
    monkeypatch.setattr(data.convert, "SHARD_STEPS", 2)
    np.save(tmp_path / "other-model.npy", COUNTS)
    convert(tmp_path / "other-model.npy", tmp_path / "trace")
    stored = open_trace(tmp_path / "trace")
    assert np.array_equal(stored.loads(), COUNTS)
    assert (stored.layout.model_id, stored.layout.num_layers, stored.num_batches) == ("other-model", 3, 5)
    with pytest.raises(ValueError, match="exists already"):
        convert(tmp_path / "other-model.npy", tmp_path / "trace")


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def write_bad(folder):
    np.save(folder / "flat.npy", COUNTS[0])
    np.save(folder / "negative.npy", -COUNTS - 1)
    np.save(folder / "half.npy", COUNTS + 0.5)
    np.savez(folder / "key.npz", loads=COUNTS)
    (folder / "cut.npz").write_bytes(b"PK\x03\x04cut")
    np.save(folder / "object.npy", np.array([Malicious()], dtype=object))
    torch.save(Malicious(), folder / "code.pt")
    torch.save({"something": torch.ones(2)}, folder / "other.pt")
    (folder / "empty").mkdir()
    (folder / "empty" / "meta_info.json").write_text("{}")
    (folder / "gap").mkdir()
    (folder / "gap" / "meta_info.json").write_text("{}")
    save_file({"0_0": COUNTS[0, 0], "1_1": COUNTS[0, 0]}, folder / "gap" / "rank0.safetensors")
    (folder / "counts.txt").write_text("1 2 3")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.npy", "does not exist"),
        ("flat.npy", r"shape \(3, 8\), expected \[steps, layers, experts\]"),
        ("negative.npy", "negative, fractional or non-finite"),
        ("half.npy", "negative, fractional or non-finite"),
        ("key.npz", r"has the keys \['loads'\], expected 'counts'"),
        ("cut.npz", "cannot be read as numpy counts"),
        ("object.npy", "cannot be read as numpy counts"),
        ("code.pt", "cannot be read as an SGLang recording"),
        ("other.pt", r"holds \['something'\], expected 'logical_count'"),
        ("empty", r"has no rank\*.safetensors"),
        ("gap", "lacks iteration 0 of layer 1"),
        ("counts.txt", "none of .npy, .npz, .pt or a folder"),
    ],
)
def test_what_is_no_recording_is_refused_and_nothing_in_it_runs(name, message, tmp_path, capsys):
    write_bad(tmp_path)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "executed" not in capsys.readouterr().out
