"""Where plans come from: saved plans, the simulator, recordings, loads in memory; which layers their rows are for."""

from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.balancing.eplb import place_experts
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.balancing.plan_file import PlannedLayers, SavedPlan, save_plan
from runtime.export.export import export_plan
from runtime.export.formats import read_engine_plan
from runtime.export.model_layers import ModelLayers, parse_numbers
from runtime.export.source import Options, open_source, plan_from_loads
from runtime.simulate.comparison import compare_policies

RECORDED = Path(__file__).parents[1] / "recorded" / "gptoss20b.npz"
LOADS = np.random.default_rng(0).multinomial(512, np.random.default_rng(1).dirichlet(np.full(8, 0.5), 3), (6, 3))


def loads_with_dense_layers():
    """Six layers, of which 0, 3 and 5 are dense."""
    loads = np.zeros((6, 6, 8), dtype=np.int64)
    loads[:, [1, 2, 4]] = LOADS
    return loads


def test_loads_become_a_plan_that_levels_their_mean():
    plan = plan_from_loads(LOADS, 4, 4)
    assert plan.phy2log.shape == (3, 12)
    load = LOADS.mean(0)
    largest = [
        np.take_along_axis(load / each.replica_count, each.phy2log, axis=-1).reshape(3, 4, 3).sum(-1).max(-1)
        for each in (plan, ReplicationPlan(place_experts(load, 12, 1, 1, 4), 4))
    ]
    assert (largest[0] <= largest[1] + 1e-9).all()
    assert plan_from_loads(LOADS.sum(0), 4, 4).phy2log.shape == (3, 12)
    assert (plan_from_loads(LOADS, 4, 4, "last").phy2log == plan_from_loads(LOADS[-1:], 4, 4).phy2log).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((LOADS, 5, 4), "8 experts and 4 redundant experts do not divide over 5 devices; choose 2 or 7"),
        ((LOADS, 4, 4, "oracle"), "forecast is 'oracle', expected 'last' or 'ema' or 'mean'"),
        ((LOADS, 0, 4), "num_devices is 0"),
        ((LOADS, 4, -1), "num_redundant_experts is -1"),
        ((-LOADS, 4, 4), "tokens cannot be negative"),
        ((LOADS + 0.5, 4, 4), "not whole numbers"),
        ((LOADS[0, 0], 4, 4), r"has shape \(8,\)"),
        ((LOADS, 1, 4), "12 slots a device are more than the 8 experts"),
    ],
)
def test_loads_that_cannot_be_planned_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        plan_from_loads(*arguments)


def test_a_recording_of_sglang_has_a_row_for_every_layer(tmp_path):
    torch.save({"rank": 0, "logical_count": torch.from_numpy(loads_with_dense_layers())}, tmp_path / "recorder_1.0.pt")
    saved = open_source(tmp_path / "recorder_1.0.pt", Options(4, 4), ModelLayers())
    assert saved.layers == PlannedLayers([1, 2, 4], 6)
    export_plan(tmp_path, "sglang", tmp_path / "plan.json", num_devices=4, num_redundant_experts=4)
    rows = read_engine_plan(tmp_path / "plan.json").rows
    assert len(rows) == 6
    assert [rows[number] for number in (1, 2, 4)] == saved.plan.phy2log.tolist()


def test_rows_of_other_recordings_are_layers_only_where_their_number_says_so(tmp_path):
    np.save(tmp_path / "loads.npy", loads_with_dense_layers())
    plan = tmp_path / "plan.json"
    options = {"num_devices": 4, "num_redundant_experts": 4}
    with pytest.raises(ValueError, match="does not say which layers its 3 rows are for"):
        export_plan(tmp_path / "loads.npy", "sglang", plan, **options)
    done = export_plan(tmp_path / "loads.npy", "sglang", plan, hidden_layers=6, **options)
    assert done.saved.layers.numbers == (1, 2, 4)
    np.save(tmp_path / "loads.npy", LOADS)
    done = export_plan(tmp_path / "loads.npy", "sglang", plan, hidden_layers=7, layers="2-4", **options)
    assert done.saved.layers == PlannedLayers([2, 3, 4], 7)


@pytest.mark.parametrize("engine", ["vllm", "vllm-ascend"])
def test_rows_for_layers_that_are_not_known_are_pointed_out(tmp_path, engine):
    done = export_plan(RECORDED, engine, tmp_path / "plan.json")
    said = "4 rows, right for a model with 4 MoE layers and no more (which these are was not given); with others, vllm"
    assert done.flags[-1].lower().startswith(said.lower())
    assert done.flags[-1].endswith("give --model FOLDER, and --layers if only some of its layers were recorded")
    done = export_plan(RECORDED, engine, tmp_path / "plan.json", hidden_layers=24, layers="5,11-13")
    assert "no more (these are 5,11-13)" in done.flags[-1]
    done = export_plan(RECORDED, "sglang", tmp_path / "plan.json", hidden_layers=24, layers="5,11-13")
    assert done.flags[-1].startswith("24 rows, right if all layers but 5,11-13 are dense; SGLang uses no")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hidden_layers": 24}, r"has 4 layers, the model 24 \(--hidden-layers\); name its MoE layers with --layers"),
        ({"hidden_layers": 3}, r"has 4 layers, the model 3 \(--hidden-layers\)"),
        ({"layers": "0-23"}, r"has 4 layers, --layers has 24 MoE layers \(0-23\), .*, and give --model FOLDER"),
    ],
)
def test_rows_that_do_not_fit_the_model_are_refused_with_both_numbers(tmp_path, options, said):
    plan = ReplicationPlan.at_home(contiguous_homes(4, 4), 2, 2)
    for source in (RECORDED, plan, np.ones((4, 32))):
        with pytest.raises(ValueError, match=said):
            export_plan(source, "vllm", tmp_path / "plan.json", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_recording_of_some_layers_of_a_model(tmp_path, qwen_config):
    options = {"num_devices": 4, "num_redundant_experts": 4, "model": str(qwen_config)}
    with pytest.raises(ValueError, match=r"plan has 2 layers, .*qwen has 3 MoE layers .*; name those with --layers$"):
        export_plan(LOADS[:, :2], "vllm", tmp_path / "plan.json", **options)
    done = export_plan(LOADS[:, :2], "vllm", tmp_path / "plan.json", layers="2,4", **options)
    assert (len(done.saved.plan.phy2log), done.unplanned) == (3, 1)
    assert (done.saved.plan.phy2log[1:] == plan_from_loads(LOADS[:, :2], 4, 4).phy2log).all()
    assert not any("rows, right for" in line for line in done.flags)
    known = SavedPlan(ReplicationPlan(done.saved.plan.phy2log[:2], 4), PlannedLayers([1, 2], 6))
    with pytest.raises(ValueError, match="the plan is for layers 1-2, --layers names 2,4; leave it out"):
        export_plan(known, "vllm", tmp_path / "plan.json", model=str(qwen_config), layers="2,4")
    with pytest.raises(ValueError, match="the plan is for a model of 6 layers, --hidden-layers says 7"):
        export_plan(known, "vllm", tmp_path / "plan.json", hidden_layers=7)


def test_a_saved_plan_is_exported_as_it_is(tmp_path, saved):
    save_plan(tmp_path / "saved.json", saved.plan, saved.layers)
    export_plan(tmp_path / "saved.json", "tensorrt-llm", tmp_path / "plan.yaml")
    assert list(read_engine_plan(tmp_path / "plan.yaml").rows) == [1, 2, 4]
    with pytest.raises(ValueError, match="--devices has no meaning for a saved plan; leave it out"):
        export_plan(tmp_path / "saved.json", "vllm", tmp_path / "plan.json", num_devices=8)


def test_a_step_of_one_of_the_simulators_policies(tmp_path):
    plans = tmp_path / "plans.npz"
    compare_policies(RECORDED, 8, 16, ["last", "ema"], ["eplb", "home"], ["quota"], steps=4, save_plans=plans)
    with pytest.raises(ValueError, match=r"holds plans of ema.eplb.quota, .*; choose one: --policy ema.eplb.quota"):
        export_plan(plans, "vllm", tmp_path / "plan.json")
    for policy in ("ema.eplb.quota", "last.home.quota"):
        with np.load(plans) as arrays:
            whole = arrays[f"{policy}.phy2log"]
        for step in (None, 0):
            done = export_plan(plans, "vllm", tmp_path / "plan.json", policy=policy, step=step)
            kept = whole[-1 if step is None else step]
            assert done.saved.plan.num_devices == 8
            same = (done.saved.plan.phy2log == kept).sum()
            assert same == kept.size - done.empty - done.twice
    with pytest.raises(ValueError, match=r"plans.npz has 4 layers, --layers has 24 MoE layers"):
        export_plan(plans, "vllm", tmp_path / "plan.json", policy="last.home.quota", layers="0-23")
    done = export_plan(
        plans, "sglang", tmp_path / "plan.json", policy="last.home.quota", layers="5-8", hidden_layers=24
    )
    assert done.saved.layers.numbers == (5, 6, 7, 8)
    with pytest.raises(ValueError, match=r"--step is 4, .* holds 4 steps of last.home.quota: 0 to 3, or -1"):
        export_plan(plans, "vllm", tmp_path / "plan.json", policy="last.home.quota", step=4)
    with pytest.raises(ValueError, match=r"policy is 'x', expected 'ema.eplb.quota'"):
        export_plan(plans, "vllm", tmp_path / "plan.json", policy="x")
    with pytest.raises(ValueError, match="--redundant has no meaning for plans of the simulator"):
        export_plan(plans, "vllm", tmp_path / "plan.json", num_redundant_experts=16)


def test_plans_of_the_simulator_that_were_changed_are_refused(tmp_path):
    for arrays, said in (
        ({"a.phy2log": np.zeros((2, 2)), "a.device_load": np.zeros((2, 2, 2)), "layers": np.arange(2)}, "float64"),
        (
            {"a.phy2log": np.zeros((1, 1, 2), int), "a.device_load": np.zeros((2, 1, 2)), "layers": np.arange(1)},
            "differ",
        ),
        ({"a.phy2log": np.zeros((1, 1, 2), int), "layers": np.arange(1)}, "cannot be read"),
    ):
        np.savez(tmp_path / "plans.npz", **arrays)
        with pytest.raises(ValueError, match=said):
            export_plan(tmp_path / "plans.npz", "vllm", tmp_path / "plan.json")


def test_loads_in_memory_and_plans_are_exported(tmp_path):
    done = export_plan(LOADS, "vllm", tmp_path / "plan.json", num_devices=4, num_redundant_experts=4)
    assert (done.saved.plan.phy2log == plan_from_loads(LOADS, 4, 4).phy2log).all()
    plan = ReplicationPlan.at_home(contiguous_homes(2, 4), 2, 2)
    assert export_plan(plan, "vllm", tmp_path / "plan.json").empty == 4
    with pytest.raises(ValueError, match=r"plan.json ends in '.json', tensorrt-llm reads .yaml"):
        export_plan(plan, "tensorrt-llm", tmp_path / "plan.json", hidden_layers=2)
    with pytest.raises(ValueError, match="engine is 'dynamo', expected 'sglang'"):
        export_plan(plan, "dynamo", tmp_path / "plan.json")


def test_numbers_of_layers():
    assert parse_numbers("0,2,4-6") == (0, 2, 4, 5, 6)
    for text in ("", "a", "3-1", "1,1", "1-3,2", "-1", "1.5", "99999"):
        with pytest.raises(ValueError, match=f"--layers is '{text}', expected numbers"):
            parse_numbers(text)
