"""What an attack found: ids that wrap, sizes without bounds, lists of other types in trace.json."""

import json

import numpy as np
import pytest

from data.arrays import MOST_EXPERTS
from data.models.layout import MoELayout
from data.traces.loads import read_loads
from data.traces.store import open_trace
from data.traces.token_recording import read_token_recording

ARRAYS = {
    "tokens": np.arange(6), "length": np.array([4, 2]), "first_routed": np.array([1, 0]), "routed": np.array([3, 2]),
    "experts": np.zeros((5, 2, 1), dtype=np.int64), "subject": np.array([0, 1]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"experts": np.full((5, 2, 1), 65539)}, "experts holds 65539, expected at most 32766"),
        ({"tokens": np.full(6, 2**40)}, f"tokens holds {2**40}, expected at most {2**31 - 1}"),
        ({"subject": np.array(["law", "art"])}, r"subject holds <U3, expected the number of each request's name"),
        ({"length": np.array(6)}, r"length has shape \(\), expected one number a request"),
        ({"vocabulary": np.array([7])}, "vocabulary is not one whole number"),
    ],
)
def test_odd_arrays_of_a_token_recording_are_refused_by_name(changed, text, tmp_path):
    np.savez(tmp_path / "tokens.npz", **ARRAYS | changed)
    with pytest.raises(ValueError, match=text):
        read_token_recording(tmp_path / "tokens.npz")


def test_one_large_id_does_not_decide_an_allocation(tmp_path):
    np.save(tmp_path / "routed_experts.npy", np.array([[[0], [1]], [[2**31 - 1], [2]]]))
    with pytest.raises(ValueError, match=rf"experts.npy holds expert {2**31 - 1}, expected 0 to {MOST_EXPERTS - 1}"):
        read_loads(tmp_path / "routed_experts.npy")
    with pytest.raises(ValueError, match=rf"num_experts is 0, expected 1 to {MOST_EXPERTS}"):
        read_loads(tmp_path / "routed_experts.npy", num_experts=0)
    with pytest.raises(ValueError, match=rf"has 99999 experts a layer, expected 1 to {MOST_EXPERTS}"):
        MoELayout("m", "", (("decoder", 0),), 99999, None, 0, 0, 0)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"splits": []}, "splits cover 0 batches, shards hold 2"),
        ({"splits": [["train", 0, 10**9]]}, f"splits cover {10**9} batches, shards hold 2"),
        ({"splits": 3}, "splits hold None"),
        ({"splits": [["train", "0", "2"]]}, r"splits hold \['train', '0', '2'\]"),
        ({"shards": [[1]]}, r"a shard is \[1\]"),
        ({"shards": [{"file": "a", "batches": 2}]}, "expected its file, sha256 and batches"),
        ({"shards": [{"file": "a", "sha256": "0", "batches": 1}] * 2}, "the shard a is listed 2 times, expected once"),
    ],
)
def test_lists_of_trace_json_are_checked_when_it_is_opened(changed, text, tmp_path):
    layout = MoELayout("m", "", (("decoder", 0),), 8, None, 0, 0, 0)
    about = {
        "format_version": 2, "granularity": "counts", "layout": layout.to_json(), "splits": [["train", 0, 2]],
        "shards": [{"file": "part.parquet", "sha256": "0", "batches": 2}],
    }  # fmt: skip
    (tmp_path / "trace.json").write_text(json.dumps(about | changed))
    with pytest.raises(ValueError, match=text):
        open_trace(tmp_path)
