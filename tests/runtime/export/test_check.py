"""Each mistake that an engine accepts or refuses is found, in one line; what is no plan is refused."""

import json

import numpy as np
import pytest
import torch

from runtime.export.check import check_plan

GOOD = [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]]
"""Two devices, four experts, two redundant."""


def row(*changes):
    """GOOD with some slots of layer 1 changed: (slot, expert)."""
    rows = [list(each) for each in GOOD]
    for slot, expert in changes:
        rows[1][slot] = expert
    return rows


def ascend(rows, **changes):
    layers = [
        {
            "layer_id": layer,
            "device_count": 2,
            "device_list": [
                {"device_id": 0, "device_expert": each[:3]},
                {"device_id": 1, "device_expert": each[3:]},
            ],
        }
        for layer, each in enumerate(rows)
    ]
    return {"moe_layer_count": len(rows), "layer_list": layers} | changes


def write(folder, engine, rows, **changes):
    """A file of an engine with these rows."""
    if engine == "tensorrt-llm":
        keys = {"num_slots": 6, "layer_updates_per_iter": 0} | changes
        lines = [f"{key}: {value}" for key, value in keys.items() if value is not None]
        lines += ["initial_global_assignments:", *(f"  {layer}: {each}" for layer, each in enumerate(rows))]
        path = folder / "plan.yaml"
        path.write_text("\n".join(lines))
        return path
    document = {"sglang": {"physical_to_logical_map": rows} | changes, "vllm": rows}.get(engine)
    path = folder / "plan.json"
    path.write_text(json.dumps(document or ascend(rows, **changes)))
    return path


@pytest.mark.parametrize("engine", ["sglang", "vllm", "tensorrt-llm", "vllm-ascend"])
def test_a_good_plan_has_no_problems(tmp_path, engine):
    found = check_plan(write(tmp_path, engine, GOOD), 2, 4, 2, hidden_layers=2)
    assert (found.plan.engine, found.problems) == (engine, [])
    assert list(found.plan.rows.values()) == GOOD


@pytest.mark.parametrize("engine", ["sglang", "vllm", "tensorrt-llm", "vllm-ascend"])
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (row((0, 1), (4, 1)), "layer 1 has no slot for expert 3"),
        (row((0, -1)), "layer 1 has an empty slot (-1), slot 0"),
        (row((2, 3)), "layer 1 has expert 3 twice on device 0"),
        (row((5, 4)), "layer 1 holds expert 4, expected 0 to 3"),
    ],
)
def test_slots_that_an_engine_gets_wrong(tmp_path, engine, rows, said):
    problems = check_plan(write(tmp_path, engine, rows), 2, 4).problems
    assert any(problem.startswith(said) and ": " in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("engine", "options", "said"),
    [
        ("sglang", {"hidden_layers": 4}, "has 2 rows for a model of 4 layers: SGLang accepts any number"),
        ("sglang", {"num_redundant_experts": 1}, "6 slots for 4 experts, which is 2 redundant experts, not 1"),
        ("sglang", {"num_devices": 4}, "6 slots, which do not divide over 4 devices: SGLang stops"),
        ("tensorrt-llm", {"num_devices": 4}, "6 slots, which do not divide over 4 devices: TensorRT-LLM rounds"),
    ],
)
def test_numbers_that_do_not_fit_the_engines_options(tmp_path, engine, options, said):
    problems = check_plan(write(tmp_path, engine, GOOD), **options).problems
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("engine", "changes", "said"),
    [
        ("sglang", {"logical_count": [[1]]}, "has the key 'logical_count' beside physical_to_logical_map"),
        ("tensorrt-llm", {"num_slots": 8}, "layer 0 has 6 slots, expected 8 (1 more layers or experts)"),
        ("tensorrt-llm", {"num_slots": None}, "names no num_slots"),
        ("tensorrt-llm", {"ep_size": 2}, "has the key 'ep_size': TensorRT-LLM refuses keys"),
        ("vllm-ascend", {"moe_layer_count": 1}, "has moe_layer_count 1 and 2 layers"),
        ("vllm-ascend", {"moe_layer_count": 3}, "has moe_layer_count 3 and 2 layers"),
    ],
)
def test_entries_beside_the_rows(tmp_path, engine, changes, said):
    problems = check_plan(write(tmp_path, engine, GOOD, **changes), 2).problems
    assert any(said in problem for problem in problems), problems


def test_layers_of_the_model_are_compared(tmp_path, qwen_config):
    three = [*GOOD, GOOD[0]]
    eight = [[*range(8), 0, 1, 2, 3]] * 3
    trt = write(tmp_path, "tensorrt-llm", eight, num_slots=12)
    (problem,) = check_plan(trt, 4, model=str(qwen_config)).problems
    assert problem.startswith("has a row for layer 0 (2 layers differ from the model's MoE layers): TensorRT-LLM stops")
    for engine in ("vllm", "vllm-ascend"):
        (problem,) = [
            said
            for said in check_plan(write(tmp_path, engine, GOOD), 2, 4, model=str(qwen_config)).problems
            if "MoE layers" in said
        ]
        assert problem.startswith("has 2 layers for a model of 3 MoE layers: ")
    assert check_plan(write(tmp_path, "vllm", three), 2, 4, model=str(qwen_config)).problems == []


def test_a_whole_configuration_of_tensorrt_llm_says_whether_the_plan_is_used(tmp_path):
    inner = write(tmp_path, "tensorrt-llm", GOOD).read_text()
    indented = "".join(f"    {line}\n" for line in inner.splitlines())
    path = tmp_path / "config.yaml"
    path.write_text(f"moe_config:\n  load_balancer:\n{indented}moe_expert_parallel_size: 2\n")
    (problem,) = check_plan(path).problems
    assert problem.startswith("has no enable_attention_dp: true")
    path.write_text(path.read_text() + "enable_attention_dp: true\n")
    assert check_plan(path).problems == []
    assert check_plan(path).plan.num_devices == 2


def test_ascends_order_and_devices(tmp_path):
    document = ascend(GOOD)
    document["layer_list"][0]["layer_id"] = 3
    document["layer_list"][1]["device_list"].append({"device_id": 2, "device_expert": [0, 1, 2]})
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    problems = check_plan(path).problems
    for said in (
        "has layer_id 3 at place 0",
        "layer 1 has device_count 2 and 3 devices",
        "has layers of [2, 3] devices",
    ):
        assert any(said in problem for problem in problems), problems
    document = ascend(GOOD)
    document["layer_list"][1]["device_list"][0]["device_expert"].append(3)
    path.write_text(json.dumps(document))
    assert any("layer 1: devices hold [3, 4] experts" in problem for problem in check_plan(path).problems)


def test_one_row_for_all_layers_of_vllm(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(GOOD[0]))
    found = check_plan(path, 2)
    assert (found.plan.rows, found.problems) == ({0: GOOD[0]}, [])
    assert any("every MoE layer" in note for note in found.notes)


def test_what_was_not_checked_is_noted(tmp_path):
    everything = {"num_devices": 2, "num_experts": 4, "num_redundant_experts": 2, "hidden_layers": 2, "layers": "0-1"}
    for engine in ("sglang", "vllm", "vllm-ascend", "tensorrt-llm"):
        path = write(tmp_path, engine, GOOD)
        notes = [note for note in check_plan(path).notes if note.startswith("not checked: ")]
        layers = "--model or --hidden-layers" if engine == "sglang" else "--model or --layers"
        options = ["--devices", "--experts or --model", "--redundant", layers]
        assert [note.split("give ")[1] for note in notes] == options[engine == "vllm-ascend" :]
        assert not any(note.startswith("not checked: ") for note in check_plan(path, **everything).notes)


@pytest.mark.parametrize("engine", ["vllm", "vllm-ascend", "tensorrt-llm"])
def test_the_layers_are_checked_without_a_model_too(tmp_path, engine):
    path = write(tmp_path, engine, GOOD)
    assert check_plan(path, layers="0-1").problems == []
    (problem,) = check_plan(path, layers="0-3", hidden_layers=5).problems
    assert "lacks layer 2 (2 layers" in problem or "has 2 layers for a model of 4 MoE layers" in problem
    (problem,) = check_plan(path, hidden_layers=1).problems
    assert problem.startswith("has a row for layer 1 of a model of 1 layers: ")
    (problem,) = check_plan(write(tmp_path, "sglang", GOOD), layers="2-3").problems
    assert problem.startswith("has 2 rows for a model with the MoE layer 3: SGLang accepts any number of rows")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("plan.json", b'{"a": 1}', "holds the keys ['a'], expected a plan of sglang"),
        ("plan.json", b'"text"', 'holds "text", expected a plan'),
        ("plan.json", b"null", "holds null, expected a plan"),
        ("plan.json", b"[null]", "the map, slot 0 holds null, expected an expert"),
        ("plan.json", b'{"physical_to_logical_map": null}', "physical_to_logical_map holds null, expected a list"),
        ("plan.json", b"[]", "the map holds 0 rows"),
        ("plan.json", b"[[0, NaN]]", "is not JSON (it holds NaN)"),
        ("plan.json", b"[[0, 1e400]]", "slot 1 holds Infinity"),
        ("plan.json", b"[[0, true]]", "slot 1 holds true"),
        ("plan.json", b"[[[0]]]", "slot 0 holds a list of 1"),
        ("plan.json", b"[" * 50_000, "is not JSON"),
        ("plan.json", b'{"logical_count": [[1, 2]]}', "holds logical_count, loads from which SGLang plans for itself"),
        ("plan.json", b'{"physical_to_logical_map": "x"}', 'physical_to_logical_map holds "x"'),
        ("plan.json", b'{"layer_list": [], "moe_layer_count": 0}', "layer_list is an empty list, expected a list"),
        ("plan.json", b'{"layer_list": [1], "moe_layer_count": 1}', "layer_list[0] is 1, expected a mapping"),
        ("plan.json", b'{"layer_list": [{}], "moe_layer_count": true}', "moe_layer_count is true"),
        ("plan.yaml", b"a: &x [1]\nb: *x\n", "is not YAML (it has an alias"),
        ("plan.yaml", b"[" * 60 + b"]" * 60, "nested more than 50"),
        ("plan.yaml", b"initial_global_assignments: 3", "initial_global_assignments is 3, expected a mapping"),
        ("plan.yaml", b"initial_global_assignments: {}", "is empty, expected a row for each MoE layer"),
        ("plan.yaml", b"initial_global_assignments: {-1: [0]}", "a layer is -1, expected a whole number"),
        ("plan.yaml", b"moe_config: {}", "load_balancer is null, expected a mapping"),
        ("plan.pt", b"not a tensor", "cannot be read as a map of SGLang"),
        ("plan.txt", b"\xff", "is no text"),
    ],
)
def test_what_is_no_plan_is_refused_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        check_plan(tmp_path / name)
    assert said in str(refused.value)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_pickled_objects_and_tensors_that_grow_are_refused(tmp_path):
    path = tmp_path / "plan.pt"
    torch.save({"physical_to_logical_map": torch.zeros(1, dtype=torch.int64).expand(10**6, 10**6)}, path)
    with pytest.raises(ValueError, match="is stored in 8 bytes"):
        check_plan(path)
    torch.save({"physical_to_logical_map": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="cannot be read as a map of SGLang"):
        check_plan(path)
    torch.save({"physical_to_logical_map": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"slot 0 holds 0\.0, expected an expert"):
        check_plan(path)


def test_devices_that_contradict_the_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is for 2 devices, 4 were given"):
        check_plan(write(tmp_path, "vllm-ascend", GOOD), 4)
    with pytest.raises(ValueError, match="num_devices is 0, expected a whole number"):
        check_plan(write(tmp_path, "vllm", GOOD), 0)
