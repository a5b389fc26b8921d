"""Plans go to every engine's file and come back; the rules of all engines hold at once."""

import json

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.balancing.plan_file import PlannedLayers, SavedPlan, load_plan
from runtime.export.check import check_plan
from runtime.export.export import export_plan
from runtime.export.filling import exportable, refilled
from runtime.export.formats import FORMATS, read_engine_plan
from tests.helpers.engine_twins import TensorRTLLMTwin, VllmAscendTwin

ENGINES = ["sglang", "vllm", "tensorrt-llm", "vllm-ascend"]


@st.composite
def plans(draw):
    """A plan of any geometry that engines can be given: empty slots, and second copies on a device."""
    devices, size = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    experts = draw(st.integers(size, devices * size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    others = rng.integers(-1, experts, (3, devices * size - experts))
    rows = [rng.permutation(np.r_[np.arange(experts), other]) for other in others]
    return ReplicationPlan(np.array(rows), devices)


@given(plans())
def test_all_rules_hold_for_any_geometry(plan):
    filled = exportable(plan)
    assert filled.num_experts == plan.num_experts
    assert filled.phy2log.min() >= 0
    for row in filled.phy2log:
        assert set(row) == set(range(plan.num_experts))
        for block in row.reshape(plan.num_devices, -1):
            assert len(set(block)) == len(block)
    changed = (filled.phy2log != plan.phy2log).sum()
    assert changed == sum(refilled(plan))
    assert (exportable(filled).phy2log == filled.phy2log).all()


def test_a_home_stays_where_an_expert_is_on_its_device_twice():
    plan = ReplicationPlan(np.array([[1, 0, 1, 2, 3, -1]]), 2, np.array([[1, 2, 3, 4]]))
    assert exportable(plan).phy2log.tolist() == [[2, 0, 1, 2, 3, 0]]


def test_more_slots_than_experts_on_a_device_are_refused():
    plan = ReplicationPlan(np.array([[0, 1, -1, 0, 1, -1]]), 2)
    with pytest.raises(ValueError, match=r"a device has 3 slots for 2 experts.*plan at most 2 redundant"):
        exportable(plan)


@pytest.mark.parametrize("engine", [*ENGINES, "switchcast"])
def test_every_format_comes_back_to_the_same_maps(tmp_path, saved, engine):
    path = tmp_path / f"plan{FORMATS[engine].suffix}"
    done = export_plan(saved, engine, path)
    found = check_plan(path, num_devices=4, num_experts=8, num_redundant_experts=4, hidden_layers=6)
    assert found.problems == []
    assert found.plan.engine == engine
    numbers = saved.layers.numbers if FORMATS[engine].counts_dense or engine == "switchcast" else range(3)
    if engine == "switchcast":
        numbers = saved.layers.numbers
    assert [found.plan.rows[number] for number in numbers] == saved.plan.phy2log.tolist()
    assert len(found.plan.rows) == (6 if engine == "sglang" else 3)
    assert any(str(path) in line for line in done.flags)


@given(plans(), st.integers(0, 3))
def test_any_plan_comes_back_from_every_format(tmp_path_factory, plan, before):
    folder, filled = tmp_path_factory.mktemp("plans"), exportable(plan)
    saved = SavedPlan(plan, PlannedLayers(range(before, before + 3), before + 4))
    for engine in ENGINES:
        path = folder / f"{engine}{FORMATS[engine].suffix}"
        export_plan(saved, engine, path)
        rows = list(read_engine_plan(path).rows.values())
        rows = rows[before : before + 3] if engine == "sglang" else rows
        assert rows == filled.phy2log.tolist()
        assert check_plan(path, plan.num_devices, plan.num_experts).problems == []


def test_sglang_has_a_row_for_every_layer_and_dense_ones_are_valid(tmp_path, saved):
    export_plan(saved, "sglang", tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert list(document) == ["physical_to_logical_map"]
    rows = np.array(document["physical_to_logical_map"])
    assert rows.shape == (6, 12)
    assert rows[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert (rows[[1, 2, 4]] == saved.plan.phy2log).all()


def test_sglangs_pt_is_read_as_its_json(tmp_path, saved):
    rows = torch.from_numpy(saved.plan.phy2log.copy())
    torch.save({"physical_to_logical_map": rows}, tmp_path / "plan.pt")
    found = check_plan(tmp_path / "plan.pt", num_devices=4)
    assert (found.plan.engine, found.problems) == ("sglang", [])
    assert list(found.plan.rows.values()) == saved.plan.phy2log.tolist()


def test_tensorrt_llm_finds_the_model_layers_by_whole_numbers(tmp_path, saved):
    export_plan(saved, "tensorrt-llm", tmp_path / "plan.yaml")
    twin = TensorRTLLMTwin(tmp_path / "plan.yaml", ep_size=4)
    for number, row in zip(saved.layers.numbers, saved.plan.phy2log.tolist(), strict=True):
        assert [expert for rank in range(4) for expert in twin.experts(number, rank)] == row
    with pytest.raises(KeyError):
        twin.experts(0, 0)  # a dense layer
    with pytest.raises(ValueError, match="12 slots"):
        TensorRTLLMTwin(tmp_path / "plan.yaml", ep_size=5)


@given(plans())
def test_vllm_ascend_sends_every_token_to_a_slot_that_holds_its_expert(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("ascend") / "plan.json"
    export_plan(plan, "vllm-ascend", path)
    for layer in range(3):
        twin = VllmAscendTwin(path, layer, plan.num_experts, plan.num_devices)
        for expert in range(plan.num_experts):
            for rank in range(plan.num_devices):
                assert twin.held(twin.slot(expert, rank)) == expert


def test_vllm_ascend_goes_wrong_where_a_device_holds_an_expert_twice(tmp_path):
    devices = [{"device_id": 0, "device_expert": [0, 1, 0]}, {"device_id": 1, "device_expert": [2, 3, 1]}]
    layer = {"layer_id": 0, "device_count": 2, "device_list": devices}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"moe_layer_count": 1, "layer_list": [layer]}))
    twin = VllmAscendTwin(path, 0, 4, 2)
    assert twin.held(twin.slot(2, 0)) != 2
    assert any("twice on device 0" in problem for problem in check_plan(path).problems)


@pytest.mark.parametrize("engine", ["sglang", "tensorrt-llm"])
def test_layers_that_are_not_known_are_asked_for(tmp_path, engine):
    plan, path = ReplicationPlan.at_home(contiguous_homes(3, 4), 2, 2), tmp_path / f"plan{FORMATS[engine].suffix}"
    with pytest.raises(ValueError, match="dense ones too, and the plan does not say which layers its 3 rows are for"):
        export_plan(plan, engine, path)
    export_plan(plan, engine, path, hidden_layers=3)  # all of them are MoE layers
    assert len(read_engine_plan(path).rows) == 3
    export_plan(plan, engine, path, layers="1-2,5", hidden_layers=8)
    assert len(read_engine_plan(path).rows) == (8 if engine == "sglang" else 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_sglang_asks_for_the_number_of_layers(tmp_path):
    plan = ReplicationPlan.at_home(contiguous_homes(3, 4), 2, 2)
    with pytest.raises(ValueError, match="does not say how many layers there are; give --model FOLDER or --hidden-l"):
        export_plan(plan, "sglang", tmp_path / "plan.json", layers="1-3")


def test_a_models_configuration_tells_the_layers_also_of_quantised_weights(tmp_path, saved, qwen_config):
    plan = saved.plan
    export_plan(plan, "sglang", tmp_path / "plan.json", model=str(qwen_config))
    assert check_plan(tmp_path / "plan.json", 4, model=str(qwen_config)).problems == []
    rows = read_engine_plan(tmp_path / "plan.json").rows
    assert [rows[number] for number in (1, 2, 4)] == plan.phy2log.tolist()
    export_plan(plan, "tensorrt-llm", tmp_path / "plan.yaml", model=str(qwen_config))
    assert list(read_engine_plan(tmp_path / "plan.yaml").rows) == [1, 2, 4]
    assert list(yaml.safe_load((tmp_path / "plan.yaml").read_text())["initial_global_assignments"]) == [1, 2, 4]
    for options, said in (
        ({"hidden_layers": 7}, "has 6 layers, --hidden-layers is 7"),
        ({"layers": "1-3"}, r"--layers names layer 3, .* has the MoE layers 1-2,4; name some of them"),
    ):
        with pytest.raises(ValueError, match=said):
            export_plan(plan, "sglang", tmp_path / "plan.json", model=str(qwen_config), **options)
    with pytest.raises(ValueError, match="has 8 experts a layer, the plan has 4"):
        export_plan(ReplicationPlan.at_home(contiguous_homes(3, 4), 2, 0), "vllm", tmp_path / "x.json",
                    model=str(qwen_config))  # fmt: skip


def test_moe_layers_that_were_not_planned_keep_their_own_order(tmp_path, saved, qwen_config):
    part = SavedPlan(ReplicationPlan(saved.plan.phy2log[[0, 2]], 4), PlannedLayers([1, 4]))
    done = export_plan(part, "vllm", tmp_path / "plan.json", model=str(qwen_config))
    assert done.unplanned == 1
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert rows[1] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert [rows[0], rows[2]] == part.plan.phy2log.tolist()
    odd = SavedPlan(part.plan, PlannedLayers([1, 3]))
    with pytest.raises(ValueError, match="has a row for layer 3, which is no MoE layer"):
        export_plan(odd, "vllm", tmp_path / "plan.json", model=str(qwen_config))


def test_our_own_format_keeps_empty_slots_and_homes(tmp_path):
    plan = ReplicationPlan.at_home(contiguous_homes(3, 4), 2, 2)
    done = export_plan(plan, "switchcast", tmp_path / "plan.json")
    assert (load_plan(done.path).plan.phy2log == plan.phy2log).all()
    assert done.empty == 6
