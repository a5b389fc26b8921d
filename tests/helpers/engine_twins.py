"""What TensorRT-LLM and vllm-ascend do with a plan, by the rules of their source: neither can be run on a CPU.

TensorRT-LLM: `llmapi/llm_args.py`, `MoeLoadBalancerConfig`. vllm-ascend: `eplb/core/eplb_utils.py`, `init_eplb_config`.
"""

import json
from pathlib import Path

import numpy as np
import yaml


class TensorRTLLMTwin:
    """A static load balancer: YAML with known keys, rows by layer number as long as `num_slots`."""

    def __init__(self, path: Path, ep_size: int) -> None:
        document = yaml.safe_load(path.read_text())
        unknown = set(document) - {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
        if unknown or document["num_slots"] % ep_size:
            raise ValueError(f"{unknown}, {document['num_slots']} slots")
        assert all(type(key) is int for key in document["initial_global_assignments"])
        self._document, self._local = document, document["num_slots"] // ep_size

    def experts(self, layer: int, rank: int) -> list[int]:
        """The experts that a rank loads for a layer of the model."""
        row = self._document["initial_global_assignments"][layer]  # a missing layer is a KeyError
        if len(row) != self._document["num_slots"]:
            raise ValueError(f"{len(row)} slots in layer {layer}")
        return row[rank * self._local : (rank + 1) * self._local]


class VllmAscendTwin:
    """A static map: each device's experts, and for each rank the slot that it sends an expert's tokens to."""

    def __init__(self, path: Path, moe_layer: int, num_experts: int, ep_size: int) -> None:
        document = json.loads(path.read_text())
        if moe_layer > document["moe_layer_count"]:
            raise ValueError("Invalid EPLB Table")
        devices = [device["device_expert"] for device in document["layer_list"][moe_layer]["device_list"]]
        self.placement = np.array(devices)  # rows of equal length
        local_of = np.full((ep_size, num_experts), -1)
        for rank in range(ep_size):
            local_of[rank, self.placement[rank]] = np.arange(self.placement.shape[1])
        # every device is taken to have as many slots as the first has experts
        size = int((local_of[0] != -1).sum())
        self._slots = [
            [rank * size + int(local_of[rank, expert]) for rank in range(ep_size) if local_of[rank, expert] >= 0]
            for expert in range(num_experts)
        ]

    def slot(self, expert: int, rank: int) -> int:
        """The slot that a rank sends an expert's tokens to."""
        return self._slots[expert][rank % len(self._slots[expert])]

    def held(self, slot: int) -> int:
        """The expert whose weights a slot really has."""
        return int(self.placement.reshape(-1)[slot])
