"""TensorRT-LLM's `MoeLoadBalancerConfig`: YAML, with the model's numbers of its MoE layers as keys.

Read from TensorRT-LLM's source (`llmapi/llm_args.py`, `moe_load_balancer.py`); it needs CUDA, so that its own code was
not run. Such a configuration is also found inside a whole one, under `moe_config: load_balancer:`.
"""

from pathlib import Path
from typing import Any, ClassVar

from data.arrays import MOST_EXPERTS
from data.errors import shown
from runtime.balancing.plan_file import MOST_LAYERS, SavedPlan, slot_row
from runtime.export.engine_plan import Consequences, EnginePlan, as_mapping, as_whole, numbers_needed

KEYS = ("num_slots", "initial_global_assignments", "layer_updates_per_iter")
MAPS = KEYS[1]
WHEN = (
    "TensorRT-LLM ignores the load balancer without a word unless enable_attention_dp is true, "
    "moe_expert_parallel_size is above 1, and the architecture is in its moe_model_arch_list"
)


class TensorRTLLMFormat:
    """Rows by layer number, and the number of slots."""

    name, suffix, counts_dense = "tensorrt-llm", ".yaml", True
    consequences: ClassVar[Consequences] = {
        "range": "TensorRT-LLM does not check it when it reads the file",
        "empty": "TensorRT-LLM does not check it when it reads the file",
        "missing": "TensorRT-LLM does not check it when it reads the file; tokens of that expert have no slot",
        "twice": "TensorRT-LLM accepts it; the second copy takes memory and balances nothing",
        "length": "TensorRT-LLM stops with a ValueError when the layer is built",
        "division": "TensorRT-LLM rounds the slots of a rank down",
        "layers": "TensorRT-LLM stops with a KeyError at the first MoE layer that has no row, and ignores other rows",
    }

    def text(self, saved: SavedPlan) -> str:
        """Numbers of layers as whole numbers, which JSON could not hold."""
        rows = zip(numbers_needed(saved, "TensorRT-LLM"), saved.plan.phy2log.tolist(), strict=True)
        lines = [f"num_slots: {saved.plan.phy2log.shape[1]}", "layer_updates_per_iter: 0", f"{MAPS}:"]
        return "\n".join([*lines, *(f"  {number}: {row}" for number, row in rows)]) + "\n"

    def flags(self, saved: SavedPlan, path: Path) -> list[str]:
        """Lines for the file given as --config (in older versions --extra_llm_api_options)."""
        return [
            f"enable_attention_dp: true\nmoe_expert_parallel_size: {saved.plan.num_devices}\n"
            f"moe_config:\n  load_balancer: {path}",
            WHEN,
        ]

    def read(self, document: Any) -> EnginePlan | None:
        """The maps, and in a whole configuration what decides whether they are used."""
        if not isinstance(document, dict) or not ({MAPS, "moe_config"} & document.keys()):
            return None
        whole = document if "moe_config" in document else {}
        if whole:
            inner = as_mapping(document["moe_config"], "moe_config").get("load_balancer")
            document = as_mapping(inner, "load_balancer")
        maps = as_mapping(document.get(MAPS), MAPS)
        rows, problems = {}, []
        for key, row in maps.items():
            if type(key) is not int:
                problems.append(f"has the layer {shown(key)}, which is no whole number: TensorRT-LLM may not find it")
            number = as_whole(int(key) if str(key).isascii() and str(key).isdigit() else key, "a layer", MOST_LAYERS)
            rows[number] = slot_row(row, f"layer {number}")
        if not rows:
            raise ValueError(f"{MAPS} is empty, expected a row for each MoE layer")
        problems += [
            f"has the key '{key}': TensorRT-LLM refuses keys that it does not know" for key in _others(document)
        ]
        slots, devices = document.get("num_slots"), whole.get("moe_expert_parallel_size")
        if slots is None:
            problems.append("names no num_slots: TensorRT-LLM stops with a ValueError")
        if whole and whole.get("enable_attention_dp") is not True:
            problems.append("has no enable_attention_dp: true, without which TensorRT-LLM ignores the load balancer")
        if whole and devices in (None, 1):
            problems.append(
                "has no moe_expert_parallel_size above 1, without which TensorRT-LLM ignores the load balancer"
            )
        return EnginePlan(
            self.name, dict(sorted(rows.items())),
            None if devices is None else max(1, as_whole(devices, "moe_expert_parallel_size", MOST_EXPERTS)),
            None if slots is None else as_whole(slots, "num_slots", MOST_EXPERTS * MOST_EXPERTS), problems, [WHEN],
        )  # fmt: skip


def _others(document: dict[Any, Any]) -> list[str]:
    return sorted(str(key)[:40] for key in document if key not in KEYS)
