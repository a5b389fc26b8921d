"""vllm-ascend's `expert_map_path`: JSON with a list of layers, each with its devices and their experts.

Read from vllm-ascend's source (`eplb/core/eplb_utils.py`); it needs an Ascend NPU, so that its own code was not run.
The MoE layer with index i uses the entry at place i of `layer_list`; its reader ignores `layer_id` and `device_id`.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

from data.arrays import MOST_EXPERTS
from data.errors import shown
from runtime.balancing.plan_file import MOST_LAYERS, SavedPlan, slot_row
from runtime.export.engine_plan import Consequences, EnginePlan, as_list, as_mapping, as_whole


class VllmAscendFormat:
    """Layers, devices in each, experts on each."""

    name, suffix, counts_dense = "vllm-ascend", ".json", False
    consequences: ClassVar[Consequences] = {
        "range": "vllm-ascend stops with an IndexError",
        "empty": "vllm-ascend takes -1 for the last expert",
        "missing": "vllm-ascend stops, or if it is the last expert, starts with too short a map",
        "twice": "vllm-ascend accepts it, and sends tokens of other experts to the wrong slots",
        "length": "vllm-ascend stops: the devices' experts make no tensor",
        "division": "vllm-ascend stops",
        "layers": "vllm-ascend uses entry i for MoE layer i (no dense ones), its default map for the one after them",
    }

    def text(self, saved: SavedPlan) -> str:
        """An entry for each MoE layer, in order."""
        plan = saved.plan
        layers = [
            {
                "layer_id": layer,
                "device_count": plan.num_devices,
                "device_list": [
                    {"device_id": device, "device_expert": experts}
                    for device, experts in enumerate(row.reshape(plan.num_devices, -1).tolist())
                ],
            }
            for layer, row in enumerate(plan.phy2log)
        ]
        entries = ",\n  ".join(map(json.dumps, layers))
        return f'{{"moe_layer_count": {len(layers)}, "layer_list": [\n  {entries}]}}\n'

    def flags(self, saved: SavedPlan, path: Path) -> list[str]:
        """Static EPLB of its model runner V1."""
        return [
            f'--enable-expert-parallel --additional-config \'{{"eplb_config": {{"expert_map_path": "{path}"}}}}\'',
            f"for {saved.plan.num_devices} devices in expert parallelism; model runner V1 only "
            "(VLLM_USE_V2_MODEL_RUNNER=0), and the file's name must end in .json",
        ]

    def read(self, document: Any) -> EnginePlan | None:
        """The devices' experts side by side as a row."""
        if not isinstance(document, dict) or "layer_list" not in document:
            return None
        layers, problems, devices = as_list(document["layer_list"], "layer_list"), list[str](), set[int]()
        count = as_whole(document.get("moe_layer_count"), "moe_layer_count", MOST_LAYERS)
        if count != len(layers):
            problems.append(
                f"has moe_layer_count {count} and {len(layers)} layers: vllm-ascend stops with 'Invalid EPLB Table' or "
                "an IndexError, or uses its default map"
            )
        rows = {}
        for place, layer in enumerate(layers[: MOST_LAYERS + 1]):
            entry = as_mapping(layer, f"layer_list[{place}]")
            held = [
                slot_row(as_mapping(device, "a device").get("device_expert"), f"layer {place}, device {number}")
                for number, device in enumerate(as_list(entry.get("device_list"), f"layer {place}: device_list"))
            ]
            if entry.get("layer_id") != place:
                problems.append(
                    f"has layer_id {shown(entry.get('layer_id'))} at place {place}: vllm-ascend goes by the place"
                )
            if entry.get("device_count", len(held)) != len(held):
                problems.append(
                    f"layer {place} has device_count {shown(entry['device_count'])} and {len(held)} devices"
                )
            if len({len(experts) for experts in held}) > 1:
                problems.append(f"layer {place}: devices hold {sorted({len(experts) for experts in held})} experts: "
                                f"{self.consequences['length']}")  # fmt: skip
            devices.add(len(held))
            rows[place] = [expert for experts in held for expert in experts]
        if len(devices) > 1:
            problems.append(f"has layers of {sorted(devices)} devices: vllm-ascend stops, or leaves the last ones out")
        if max(devices) > MOST_EXPERTS:
            raise ValueError(f"layer_list names {max(devices)} devices, expected at most {MOST_EXPERTS}")
        return EnginePlan(self.name, rows, devices.pop() if len(devices) == 1 else None, problems=problems)
