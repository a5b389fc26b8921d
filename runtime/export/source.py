"""Where an exported plan comes from: a saved plan, plans of the simulator, or loads, which are planned first.

`open_source` reads all of them; `plan_from_loads` is its part for programs that have loads in memory.

Shape suffixes: N steps, L MoE layers, E logical experts, P slots, G devices.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.arguments import check_choice, check_whole
from data.arrays import MOST_EXPERTS
from data.traces.loads import RecordedLoads, check_loads, read_loads
from data.traces.numpy_file import array_names, read_arrays
from runtime.balancing.balancer import FORECASTERS
from runtime.balancing.few_moves import rebalance
from runtime.balancing.plan import ReplicationPlan, check_division
from runtime.balancing.plan_file import PlannedLayers, SavedPlan, load_plan
from runtime.export.model_layers import ModelLayers
from runtime.export.stdin import read_stream

STDIN = Path("-")
FORECAST = "mean"
"""What a plan that stays is made for; docs/export.md compares the forecasts."""
PHY2LOG, LOAD = ".phy2log", ".device_load"


@dataclass(frozen=True)
class Options:
    """How loads become a plan, and which plan of several is taken; None where the user says nothing.

    Attributes:
        devices: Devices, G.
        redundant: Redundant experts of a layer.
        forecast: One of `FORECASTERS`: what the plan is made for.
        policy: Policy of the simulator, such as ema.home.quota.
        step: Step of the simulator's plans, 0 for the first; negative ones count from the end.
    """

    devices: int | None = None
    redundant: int | None = None
    forecast: str | None = None
    policy: str | None = None
    step: int | None = None

    def refuse(self, names: Sequence[str], what: str) -> None:
        """Refuses options that have no meaning for a source.

        Raises:
            ValueError: If one of them is given.
        """
        if given := [name for name in names if getattr(self, name) is not None]:
            raise ValueError(f"--{given[0]} has no meaning for {what}; leave it out")


def open_source(path: Path, options: Options, known: ModelLayers) -> SavedPlan:
    """The plan of a source, with the layers that its rows are for, where source or user tell them.

    Args:
        path: A saved plan (.json), `simulate --save-plans` (.npz), a trace folder or any recording that
            data/traces/loads.py reads, or "-" for loads on standard input.
        options: What goes with it.
        known: What the user says about the model.

    Raises:
        ValueError: If the source cannot be read, or an option does not fit it.
    """
    if path == STDIN:
        return _from_loads(read_stream(sys.stdin.buffer), options, known)
    if path.suffix == ".json":
        options.refuse(("devices", "redundant", "forecast", "policy", "step"), "a saved plan")
        return load_plan(path)
    if path.suffix == ".npz" and any(name.endswith(PHY2LOG) for name in array_names(path)):
        options.refuse(("devices", "redundant", "forecast"), "plans of the simulator")
        return _from_simulator(path, options, known)
    return _from_loads(read_loads(path), options, known, of_sglang=path.suffix == ".pt" or any(path.glob("*.pt")))


def plan_from_loads(
    loads: npt.ArrayLike, num_devices: int = 8, num_redundant_experts: int = 16, forecast: str = FORECAST
) -> ReplicationPlan:
    """A plan for an engine that splits an expert's tokens evenly over its copies, from past loads.

    Args:
        loads: Tokens of each expert, `[N, L, E]`, or `[L, E]` in one sum.
        num_devices: Devices, G.
        num_redundant_experts: R, of a layer over all devices.
        forecast: What the plan is made for: "mean", "ema" or "last" of the loads.

    Raises:
        ValueError: If the loads are none, or the numbers do not fit.
    """
    array = np.asarray(loads)
    array = check_loads(array[None] if array.ndim == 2 else array, Path("the loads"))
    check_choice("forecast", forecast, tuple(FORECASTERS))
    check_whole("num_devices", num_devices, 1, MOST_EXPERTS)
    check_whole("num_redundant_experts", num_redundant_experts, 0, MOST_EXPERTS)
    check_division(array.shape[2], num_devices, num_redundant_experts)
    load = FORECASTERS[forecast].forecast(None, array).load
    return ReplicationPlan(rebalance(load, array.shape[2] + num_redundant_experts, num_devices), num_devices)


def _from_loads(recorded: RecordedLoads, options: Options, known: ModelLayers, of_sglang: bool = False) -> SavedPlan:
    """Plans the layers with tokens.

    A recording of SGLang has a row for each layer of the model, dense ones too.
    """
    options.refuse(("policy", "step"), "loads")
    rows, layers, layout = recorded.loads.shape[1], recorded.layers.tolist(), recorded.layout
    numbers: Sequence[int] | None = layers
    if layout is not None and layout.causal:
        numbers = [layout.layers[layer][1] for layer in layers]
    elif not of_sglang:
        numbers = known.of_rows(f"{recorded.name} has {rows} layers", layers, rows)
    plan = plan_from_loads(
        recorded.loads[:, layers], 8 if options.devices is None else options.devices,
        16 if options.redundant is None else options.redundant, options.forecast or FORECAST,
    )  # fmt: skip
    planned = PlannedLayers(
        numbers, rows if of_sglang else known.hidden_layers, layout.model_id if layout else "",
        layout.fingerprint() if layout else "",
    )  # fmt: skip
    return SavedPlan(plan, planned)


def _from_simulator(path: Path, options: Options, known: ModelLayers) -> SavedPlan:
    """One step of one policy's plans."""
    policies = sorted(name.removesuffix(PHY2LOG) for name in array_names(path) if name.endswith(PHY2LOG))
    if options.policy is None and len(policies) > 1:
        raise ValueError(f"{path} holds plans of {', '.join(policies)}; choose one: --policy {policies[0]}")
    policy = options.policy or policies[0]
    check_choice("policy", policy, policies)
    names = [f"{policy}{PHY2LOG}", f"{policy}{LOAD}", "layers"]
    phy2log_NLP, load_NLG, layers = read_arrays(path, names).values()
    for array, name, ndim in ((phy2log_NLP, names[0], 3), (layers, names[2], 1)):
        if array.ndim != ndim or array.dtype.kind not in "iu" or not array.size:
            raise ValueError(
                f"{path}: {name} is {array.dtype} {array.shape}, expected whole numbers in {ndim} dimensions"
            )
    steps = len(phy2log_NLP)
    if load_NLG.ndim != 3 or load_NLG.shape[:2] != phy2log_NLP.shape[:2] or len(layers) != phy2log_NLP.shape[1]:
        raise ValueError(f"{path}: {policy} has arrays of different steps or layers; write it anew with --save-plans")
    step = -1 if options.step is None else options.step
    if not -steps <= step < steps:
        raise ValueError(
            f"--step is {step}, {path} holds {steps} steps of {policy}: 0 to {steps - 1}, or -1 for the last"
        )
    plan = ReplicationPlan(phy2log_NLP[step], load_NLG.shape[2])
    planned = known.of_rows(f"{path} has {len(layers)} layers", layers.tolist(), int(layers.max()) + 1)
    return SavedPlan(plan, PlannedLayers(planned, known.hidden_layers))
