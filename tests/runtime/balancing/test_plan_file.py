import json

import numpy as np
import pytest

from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.balancing.plan_file import MOST_BYTES, PlannedLayers, load_plan, save_plan


def uneven_plan() -> ReplicationPlan:
    """Three devices, four experts: homes are where `home_slots` says."""
    return ReplicationPlan(np.array([[0, -1, 1, 3, 2, 3]] * 2), 3, np.array([[0, 2, 4, 5]] * 2))


@pytest.mark.parametrize("layers", [None, PlannedLayers([3, 5], 8, "owner/model", "0123456789abcdef")])
@pytest.mark.parametrize("plan", [uneven_plan(), ReplicationPlan.at_home(contiguous_homes(2, 6), 3, 3)])
def test_a_plan_comes_back_as_it_was(tmp_path, plan, layers):
    save_plan(tmp_path / "plan.json", plan, layers)
    saved = load_plan(tmp_path / "plan.json")
    assert (saved.plan.phy2log == plan.phy2log).all()
    assert (saved.plan.homes == plan.homes).all()
    assert (saved.plan.num_devices, saved.plan.num_experts) == (plan.num_devices, plan.num_experts)
    assert saved.layers == (layers or PlannedLayers())
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_layers_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="layers holds 1 numbers, the plan has 2 MoE layers"):
        save_plan(tmp_path / "plan.json", uneven_plan(), PlannedLayers([3]))
    with pytest.raises(ValueError, match="hidden_layers is 1, the plan alone has 2"):
        save_plan(tmp_path / "plan.json", uneven_plan(), PlannedLayers(hidden_layers=1))
    with pytest.raises(ValueError, match=r"layers is \[5, 3\], expected numbers of MoE layers in ascending order"):
        PlannedLayers([5, 3])
    with pytest.raises(ValueError, match="layers holds 8, expected a whole number, 0 to 7"):
        PlannedLayers([3, 8], 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "is no plan file"),
        ({"version": 2}, "has version 2, expected 1; update Switchcast"),
        ({"extra": 1}, "has the unknown entry 'extra'"),
        ({"devices": None}, "devices holds null, expected a whole number, 1 to"),
        ({"devices": True}, "devices holds true, expected a whole number"),
        ({"devices": 4}, "6 slots do not divide over 4 devices"),
        ({"phy2log": []}, "phy2log holds 0 rows, expected a list of 1 to"),
        ({"phy2log": {"0": [1]}}, "phy2log holds an object, expected a list"),
        ({"phy2log": [[0, 1], [0]]}, "row 1 has 1 entries, row 0 has 2"),
        ({"phy2log": [[0, 1.0]]}, "phy2log, row 0, slot 1 holds 1.0, expected an expert from 0"),
        ({"phy2log": [[0, "1"]]}, 'phy2log, row 0, slot 1 holds "1", expected an expert from 0'),
        ({"phy2log": [[0, 10**30]]}, "slot 1 holds 1000000000"),
        ({"phy2log": [[0, 1, 1, 3, 4, 5]] * 2}, "layer 0 has no slot for expert 2"),
        ({"home_slots": [[0, 2, 4, 1]] * 2}, "the home slot of expert 3 holds another expert"),
        ({"home_slots": [[0]] * 2}, r"home_slots has shape \(2, 1\), expected \(2, 4\)"),
        ({"layers": [3]}, "layers holds 1 numbers, the plan has 2"),
        ({"layers": "3-4"}, 'layers is "3-4", expected a list'),
        ({"hidden_layers": -1}, "hidden_layers holds -1"),
        ({"model": None}, "model is null, expected text"),
    ],
)
def test_a_changed_file_is_refused_in_one_line(tmp_path, change, said):
    path = tmp_path / "plan.json"
    save_plan(path, uneven_plan())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=said) as refused:
        load_plan(path)
    assert "plan.json" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_plan_is_refused_in_one_line(tmp_path):
    path = tmp_path / "plan.json"
    for content, said in (
        (b'{"a": NaN}', "is not JSON .it holds NaN"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "is no plan file"),
        (b"\xff\xfe", "is no text"),
        (b" " * (MOST_BYTES + 1), "expected a plan of at most"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            load_plan(path)
    with pytest.raises(ValueError, match="is a folder, expected a plan"):
        load_plan(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_plan(tmp_path / "none.json")
