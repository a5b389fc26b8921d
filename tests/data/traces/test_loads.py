"""Recorded loads of every format become the same array; what is no recording is refused; shares and their distance."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from data.models.layout import MoELayout
from data.traces.loads import read_loads, share_of, total_variation
from data.traces.store import write_about, write_counts_shard
from tests.helpers.made_up_trace import make_layout, time_splits, write_trace

COUNTS = np.random.default_rng(0).integers(0, 50, (5, 3, 8))


def test_numpy_arrays(tmp_path):
    np.save(tmp_path / "a.npy", COUNTS.astype(np.uint16))
    np.savez_compressed(tmp_path / "a.npz", counts=COUNTS.astype(np.float32))
    for name in ("a.npy", "a.npz"):
        recorded = read_loads(tmp_path / name)
        assert np.array_equal(recorded.loads, COUNTS)
        assert recorded.loads.dtype == np.int64
        assert (recorded.name, recorded.batches, recorded.layout) == (str(tmp_path / name), None, None)


def test_a_trace_comes_with_tokens_and_layout(tmp_path):
    layout = make_layout("m")
    recorded = read_loads(write_trace(tmp_path, layout, time_splits(4, 2, 2)))
    assert recorded.loads.shape == (20, 3, 8)
    assert len(recorded.batches) == 20
    assert recorded.layout == layout


def test_a_trace_of_counts_has_neither(tmp_path):
    layout = MoELayout("m", "", tuple(("decoder", layer) for layer in range(3)), 8, 0, 0, 0, 0)
    write_about(tmp_path, layout, [write_counts_shard(tmp_path / "0.parquet", 0, COUNTS)], ["test"] * 5, "counts")
    recorded = read_loads(tmp_path)
    assert np.array_equal(recorded.loads, COUNTS)
    assert (recorded.batches, recorded.layout) == (None, None)


def test_vllm_counts_ids_in_steps_and_leaves_dense_layers_out(tmp_path):
    routed = np.random.default_rng(0).random((600, 4, 8)).argsort(-1)[..., :2].astype(np.int16)
    routed[:, 1] = 0  # a dense layer
    np.savez(tmp_path / "a.npz", routed_experts=routed)
    np.save(tmp_path / "chat.routed_experts.npy", routed)
    for name in ("a.npz", "chat.routed_experts.npy"):
        loads = read_loads(tmp_path / name).loads
        assert loads.shape == (2, 3, 8)
        assert loads.sum(-1).tolist() == [[1024] * 3, [2 * 88] * 3]
        assert np.array_equal(loads[0, 1], np.bincount(routed[:512, 2].ravel(), minlength=8))
    assert read_loads(tmp_path / "a.npz", num_experts=12).loads.shape == (2, 3, 12)
    with pytest.raises(ValueError, match="holds expert 7, expected 0 to 5"):
        read_loads(tmp_path / "a.npz", num_experts=6)
    np.savez(tmp_path / "flat.npz", routed_experts=routed[:, 0])
    with pytest.raises(ValueError, match=r"flat.npz holds int16 \(600, 2\), expected expert ids \[tokens, layers"):
        read_loads(tmp_path / "flat.npz")


def test_megatron_sums_ranks_and_takes_one_stage(tmp_path):
    rng, expected = np.random.default_rng(0), np.zeros((2, 3, 8), int)
    for rank in (0, 1):
        lines = []
        for step in (0, 1):
            for place, (block, layer) in enumerate((("decoder", 1), ("decoder", 3), ("mtp", 1))):
                ids = rng.random((5, 8)).argsort(-1)[:, :2]
                expected[step, place] += np.bincount(ids.ravel(), minlength=8)
                record = {"step": step, "block": block, "layer": layer, "rank": rank, "num_tokens": 5, "topk": 2}
                record |= {"mtp_idx": 0} if block == "mtp" else {}
                for stage in ("pre_dispatch", "post_dispatch"):
                    lines.append(json.dumps(record | {"stage": stage, "top_indices": ids.tolist()}))
        (tmp_path / f"router_trace_rank{rank}.jsonl").write_text("\n".join(lines) + "\n")
    assert np.array_equal(read_loads(tmp_path).loads, expected)
    first = tmp_path / "router_trace_rank0.jsonl"
    assert read_loads(first).loads.sum() == 2 * 3 * 10
    (tmp_path / "cut.jsonl").write_text(first.read_text()[:-40])
    with pytest.raises(ValueError, match=r"cut\.jsonl, line 12 is not a record of Megatron's router trace"):
        read_loads(tmp_path / "cut.jsonl")
    (tmp_path / "gap.jsonl").write_text("\n".join(first.read_text().splitlines()[:-2]))
    with pytest.raises(ValueError, match="lacks step 1 of layer 1"):
        read_loads(tmp_path / "gap.jsonl")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"none\.jsonl holds no record with tokens"):
        read_loads(tmp_path / "none.jsonl")
    idle = [{"step": step, "layer": 1, "top_indices": ids} for step, ids in enumerate(([[0, 3]], [], [[1, 3]]))]
    (tmp_path / "idle.jsonl").write_text("\n".join(map(json.dumps, idle)))
    recorded = read_loads(tmp_path / "idle.jsonl")
    assert recorded.loads.tolist() == [[[1, 0, 0, 1]], [[0, 1, 0, 1]]]
    assert recorded.empty_steps == 1


def test_tensorrt_llm_statistics(tmp_path):
    (tmp_path / "meta_info.json").write_text(json.dumps({"num_experts": 8}))
    for rank, half in enumerate((COUNTS // 2, COUNTS - COUNTS // 2)):
        tensors = {f"{10 + step}_{3 + layer}": half[step, layer] for step in range(5) for layer in range(3)}
        save_file(tensors, tmp_path / f"rank{rank}.safetensors")
    assert np.array_equal(read_loads(tmp_path).loads, COUNTS)


def test_steps_without_tokens_are_no_load(tmp_path, caplog):
    np.save(tmp_path / "padded.npy", np.concatenate([COUNTS[:2], np.zeros((7, 3, 8), int), COUNTS[2:]]))
    recorded = read_loads(tmp_path / "padded.npy")
    assert np.array_equal(recorded.loads, COUNTS)
    assert recorded.empty_steps == 7
    assert "padded.npy: 7 of 12 steps hold no tokens and are left out" in caplog.text
    np.save(tmp_path / "idle.npy", np.zeros((4, 3, 8), int))
    with pytest.raises(ValueError, match=r"idle.npy holds no tokens in any of its 4 steps"):
        read_loads(tmp_path / "idle.npy")


def test_ids_in_a_file_that_does_not_say_so_are_not_counted_as_loads(tmp_path):
    routed = np.random.default_rng(0).random((300, 4, 32)).argsort(-1)[..., :8].astype(np.int16)
    routed[:, 1] = 0  # a dense layer
    np.save(tmp_path / "ids.npy", routed)
    with pytest.raises(ValueError, match=r"ids.npy looks like expert ids .*; name it ids.routed_experts.npy if it is"):
        read_loads(tmp_path / "ids.npy")
    np.save(tmp_path / "ids.routed_experts.npy", routed)
    assert read_loads(tmp_path / "ids.routed_experts.npy").loads.sum() == 300 * 3 * 8
    counts = np.random.default_rng(0).multinomial(900, np.full(8, 1 / 8), (300, 4))
    np.save(tmp_path / "counts.npy", counts)
    assert np.array_equal(read_loads(tmp_path / "counts.npy").loads, counts)
    np.savez(tmp_path / "named.npz", counts=routed.astype(int) + (routed.sum(-1, keepdims=True) == 0))
    assert read_loads(tmp_path / "named.npz").loads.shape == (300, 4, 8), "the key says what it is"


def test_vllm_fills_dense_layers_with_any_number(tmp_path):
    routed = np.random.default_rng(0).random((600, 3, 8)).argsort(-1)[..., :2].astype(np.int16)
    routed[:, 0] = -1
    np.savez(tmp_path / "a.npz", routed_experts=routed)
    assert read_loads(tmp_path / "a.npz").loads.shape == (2, 2, 8)


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def write_bad(folder):
    np.save(folder / "flat.npy", COUNTS[0])
    np.save(folder / "none.npy", COUNTS[:0])
    np.save(folder / "negative.npy", -COUNTS - 1)
    np.save(folder / "half.npy", COUNTS + 0.5)
    np.save(folder / "huge.npy", COUNTS + 1e300)
    np.save(folder / "unsigned.npy", np.full((2, 3, 8), 2**63 + 1, dtype=np.uint64))
    np.save(folder / "text.npy", COUNTS.astype(str))
    np.savez(folder / "key.npz", loads=COUNTS)
    (folder / "cut.npz").write_bytes(b"PK\x03\x04cut")
    np.save(folder / "object.npy", np.array([Malicious()], dtype=object))
    torch.save(Malicious(), folder / "code.pt")
    torch.save({"something": torch.ones(2)}, folder / "other.pt")
    slots = torch.tensor([[0, 1]])
    torch.save({"records": [], "last_physical_to_logical_map": slots}, folder / "silent.pt")
    torch.save({"records": [{"rank": 0}], "last_physical_to_logical_map": slots}, folder / "keyless.pt")
    wide = {"forward_pass_id": 0, "global_physical_count": torch.ones(1, 3)}
    torch.save({"records": [wide], "last_physical_to_logical_map": slots}, folder / "wide.pt")
    rows = {
        "gap": {"0_0": COUNTS[0, 0], "1_1": COUNTS[0, 0]},
        "named": {"layer": COUNTS[0, 0]},
        "ragged": {"0_0": COUNTS[0, 0], "0_1": COUNTS[0, 0, :4]},
        "meta": {"0_0": COUNTS[0, 0]},
        "fraction": {"0_0": COUNTS[0, 0] + 0.5},
        "halves": {"0_0": COUNTS[0, 0] + 0.5},
        "cancel": {"0_0": -COUNTS[0, 0] - 1},
    }
    for name, tensors in rows.items():
        (folder / name).mkdir()
        (folder / name / "meta_info.json").write_text('{"num_experts": 4}' if name == "meta" else "{}")
        save_file(tensors, folder / name / "rank0.safetensors")
    save_file({"0_0": COUNTS[0, 0] + 0.5}, folder / "halves" / "rank1.safetensors")
    save_file({"0_0": 3 * COUNTS[0, 0] + 9}, folder / "cancel" / "rank1.safetensors")
    (folder / "empty").mkdir()
    (folder / "counts.txt").write_text("1 2 3")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.npy", "does not exist; expected a trace folder, .npy or .npz counts or routed_experts, a Megatron"),
        ("flat.npy", r"has shape \(3, 8\), expected \[steps, layers, experts\], at least one of each"),
        ("none.npy", r"has shape \(0, 3, 8\)"),
        ("negative.npy", "holds -50; tokens cannot be negative"),
        ("half.npy", "holds figures that are not whole numbers"),
        ("huge.npy", r"holds 1e\+300; expected counts of tokens, at most"),
        ("unsigned.npy", rf"holds {2**63 + 1}; expected counts of tokens, at most"),
        ("text.npy", "holds <U21, expected counts of tokens"),
        ("key.npz", r"holds \['loads'\], expected the key 'counts'"),
        ("cut.npz", "cannot be read"),
        ("object.npy", "cannot be read"),
        ("code.pt", "cannot be read as an SGLang recording"),
        ("other.pt", r"holds \['something'\], expected 'logical_count'"),
        ("silent.pt", "is not laid out as an SGLang recording: it holds no forward pass"),
        ("keyless.pt", "is not laid out as an SGLang recording: 'forward_pass_id'"),
        ("wide.pt", r"a record counts \(1, 3\) slots, the map has \(1, 2\)"),
        ("gap", "lacks iteration 0 of layer 1"),
        ("named", "has the key 'layer', expected '<iteration>_<layer>'"),
        ("ragged", r"counts \[4, 8\] experts in different places"),
        ("meta", r"counts 8 experts, its meta_info.json names 4"),
        ("fraction", "holds figures that are not whole numbers"),
        ("halves", "rank0.safetensors holds figures that are not whole numbers"),
        ("cancel", r"rank0.safetensors holds -\d+; tokens cannot be negative"),
        (
            "empty",
            r"has no trace.json, no \*.pt, no rank\*.safetensors and no router_trace_rank\*.jsonl; expected a trace",
        ),
        ("counts.txt", "is not a recording; expected a trace folder"),
    ],
)
def test_what_is_no_recording_is_refused_and_nothing_in_it_runs(name, message, tmp_path, capsys):
    write_bad(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_loads(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_shares_and_their_distance_by_hand():
    shares = share_of(np.array([[1, 3, 0, 0], [0, 0, 0, 0]]))
    assert shares.tolist() == [[0.25, 0.75, 0, 0], [0.25, 0.25, 0.25, 0.25]]
    assert total_variation(shares, np.array([[0.5, 0.5, 0, 0], [1, 0, 0, 0]])).tolist() == [0.25, 0.75]


def test_importing_the_reader_loads_numpy_alone():
    script = (
        "import sys, data.traces.loads; print({'torch', 'pyarrow', 'safetensors', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
