"""What a model and its experts would take, computed from its configuration: no weights are read, nothing runs.

    python -m runtime.infer --model mistralai/Mixtral-8x7B-v0.1 --device cuda --device-memory 60GiB --dry-run

The model is built on the meta device: modules and shapes without values.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data.byte_sizes import parse_bytes, show_bytes
from data.models.layout import MoELayout
from data.models.model import Dtype, outline
from predictor.checkpoint import differences, read_config
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.distributed.ranks import EMULATED_DEVICES
from runtime.engine.arguments import check_arguments
from runtime.engine.engine import REDUNDANT

BUFFERS = 2
"""Buffers of a replica slot: one computes while the next expert is written to the other."""


@dataclass(frozen=True)
class Sizes:
    """Parameters and bytes of a model.

    Attributes:
        parameters: All of them.
        expert: Parameters of one expert.
        experts: Experts in all MoE layers.
        active_experts: Experts that one token runs through, over all layers.
        itemsize: Bytes of a parameter.
    """

    parameters: int
    expert: int
    experts: int
    active_experts: int
    itemsize: int

    @property
    def dense(self) -> int:
        """Parameters outside the experts, which every process holds: attention, embeddings, routers, shared experts."""
        return self.parameters - self.experts * self.expert

    @property
    def active(self) -> int:
        """Parameters outside the experts and of the experts that one token runs through."""
        return self.dense + self.active_experts * self.expert


def size_up(
    model: str, revision: str, predictor: Path | None, dtype: Dtype, devices: int | None, redundant: int | None,
    device_memory: str | None, host_memory: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Prints geometry, bytes, plan and budget of a model.

    Args:
        model: 'switch-mini-64' (bundled), a local folder with at least config.json, or a hub id.
        revision: Revision of a hub model.
        predictor: Folder that `train.py` wrote, whose geometry must be the model's; its weights are not read.
        dtype: Data type of the weights.
        devices: Devices that the experts are spread over, G; 8 by default.
        redundant: Replica slots of each MoE layer over all devices, R; by default 16, or none on one device.
        device_memory: Bytes for experts where they are computed; None keeps all of them there.
        host_memory: Bytes of host memory below that.

    Returns:
        A JSON document.

    Raises:
        ValueError: If the model cannot be run, the predictor is for another family or geometry, slots do not divide
            over devices, or a budget is too small.
    """
    check_arguments(1, devices, redundant, None, None, None, 0, device_memory, host_memory)
    loaded = outline(model, revision)
    layout = loaded.layout
    if predictor is not None:
        trained = MoELayout.from_json(read_config(predictor)["layout"])
        if found := differences(layout, trained):
            raise ValueError(f"{predictor} was trained for {trained.model_id}, the model is {model}{found}")
    sizes = _sizes(loaded, getattr(torch, dtype).itemsize)
    nbytes = sizes.expert * sizes.itemsize
    document: dict[str, Any] = {
        "model": model, "family": layout.family, "dtype": dtype, "moe_layers": layout.num_layers,
        "experts": layout.num_experts, "experts_per_token": layout.experts_per_token, "d_model": layout.d_model,
        "d_ff": layout.d_ff, "parameters": sizes.parameters, "active_parameters": sizes.active,
        "expert_bytes": nbytes, "all_experts_bytes": sizes.experts * nbytes,
        "dense_bytes": sizes.dense * sizes.itemsize,
    }  # fmt: skip
    if device_memory is None:
        devices = EMULATED_DEVICES if devices is None else devices
        redundant = (REDUNDANT if devices > 1 else 0) if redundant is None else redundant
        document["plan"] = _plan(layout.num_layers, layout.num_experts, devices, redundant, nbytes, sizes)
    else:
        document["budget"] = _budget(device_memory, host_memory, nbytes, sizes)
    show(document, Console())
    return document


def _sizes(loaded: Any, itemsize: int) -> Sizes:
    layout = loaded.layout
    modules = [loaded.model.get_submodule(name) for name in layout.modules]
    experts = layout.num_layers * layout.num_experts
    each = sum(parameter.numel() for module in modules for parameter in module.parameters()) // experts
    total = sum(parameter.numel() for parameter in loaded.model.parameters())
    return Sizes(total, each, experts, layout.num_layers * layout.experts_per_token, itemsize)


def _plan(layers: int, experts: int, devices: int, redundant: int, nbytes: int, sizes: Sizes) -> dict[str, Any]:
    """Slots and bytes of each device."""
    plan = ReplicationPlan.at_home(contiguous_homes(layers, experts), devices, redundant)
    homes = -(-experts // devices)
    replicas = plan.slots_per_device - homes
    weights = layers * (homes + BUFFERS * replicas) * nbytes
    return {
        "devices": devices, "redundant": redundant, "home_slots": homes, "replica_slots": replicas,
        "expert_bytes": weights, "replica_bytes": layers * BUFFERS * replicas * nbytes,
        "bytes": weights + sizes.dense * sizes.itemsize,
    }  # fmt: skip


def _budget(device_memory: str, host_memory: str | None, nbytes: int, sizes: Sizes) -> dict[str, Any]:
    """Experts that each tier of memory holds, and what a decoded token needs."""
    device = parse_bytes(device_memory)
    held = min(device // nbytes, sizes.experts)
    if not held:
        raise ValueError(
            f"device_memory is {device_memory}, and one expert takes {show_bytes(nbytes)}; give at least that"
        )
    host = parse_bytes(host_memory) if host_memory is not None else 0
    return {
        "device_memory": device, "host_memory": host, "resident": held, "resident_share": held / sizes.experts,
        "in_host_memory": min(host // nbytes, sizes.experts), "bytes": held * nbytes + sizes.dense * sizes.itemsize,
        "bytes_a_token": sizes.active_experts * nbytes,
    }  # fmt: skip


def show(found: dict[str, Any], console: Console) -> None:
    """Prints the document as a table."""
    table = Table(title=f"{found['model']}: nothing was loaded or run", show_header=False)
    rows = {
        "family, data type": f"{found['family']}, {found['dtype']}",
        "MoE layers": f"{found['moe_layers']}, each with {found['experts']} experts, of which a token takes "
        f"{found['experts_per_token']}",
        "parameters": f"{found['parameters'] / 1e6:,.0f} million, of which {found['active_parameters'] / 1e6:,.0f} "
        "for one token",
        "one expert": f"{show_bytes(found['expert_bytes'])} ({found['d_model']} x {found['d_ff']})",
        "all experts": show_bytes(found["all_experts_bytes"]),
        "everything else": f"{show_bytes(found['dense_bytes'])}, held by every process",
    }
    if plan := found.get("plan"):
        rows["each of " + f"{plan['devices']} devices"] = (
            f"{plan['home_slots']} home and {plan['replica_slots']} replica slots a layer: "
            f"{show_bytes(plan['expert_bytes'])}, of which {show_bytes(plan['replica_bytes'])} for replicas"
        )
        rows["weights of a device"] = f"{show_bytes(plan['bytes'])}, without activations and key-value cache"
    if budget := found.get("budget"):
        rows["experts on the device"] = f"at most {budget['resident']:,}, {budget['resident_share']:.0%} of all"
        if budget["host_memory"]:
            rows["experts in host memory"] = f"at most {budget['in_host_memory']:,}, read buffers not counted"
        rows["a decoded token needs"] = f"{show_bytes(budget['bytes_a_token'])} of experts"
        rows["weights on the device"] = f"{show_bytes(budget['bytes'])}, without activations and key-value cache"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
