"""Writes a plan for an engine: `export_plan`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from data.arguments import check_choice
from data.files import write_text
from runtime.balancing.plan import ReplicationPlan
from runtime.balancing.plan_file import SavedPlan
from runtime.export.engine_plan import EngineFormat
from runtime.export.filling import exportable, refilled
from runtime.export.formats import FORMATS
from runtime.export.model_layers import ModelLayers, for_model, model_layers, runs
from runtime.export.source import FORECAST, Options, open_source, plan_from_loads

Engine = Literal["sglang", "vllm", "tensorrt-llm", "vllm-ascend", "switchcast"]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        saved: The plan in it, without empty slots.
        flags: Options of the engine that go with the file, then what else its user must know, a line each.
        empty: Empty slots that were filled, over all layers.
        twice: Slots with a second copy on their device that were filled anew.
        unplanned: MoE layers without a plan, whose experts lie in their own order.
    """

    path: Path
    saved: SavedPlan
    flags: list[str]
    empty: int
    twice: int
    unplanned: int


def export_plan(
    plan: ReplicationPlan | SavedPlan | Path | str | Any,
    engine: Engine,
    path: Path | str,
    *,
    num_devices: int | None = None,
    num_redundant_experts: int | None = None,
    forecast: str | None = None,
    policy: str | None = None,
    step: int | None = None,
    model: str | None = None,
    layers: str | None = None,
    hidden_layers: int | None = None,
) -> Exported:
    """Writes a plan as the file of an engine, whole or not at all.

    Args:
        plan: A plan; a path of a saved plan, of the simulator's plans, or of recorded loads; or loads in memory,
            `[N, L, E]` or `[L, E]`, which are planned first.
        engine: "sglang", "vllm", "tensorrt-llm", "vllm-ascend", or "switchcast" for our own plan file.
        path: The file.
        num_devices: Devices that loads are planned for; by default 8.
        num_redundant_experts: Redundant experts of a layer that loads are planned with; by default 16.
        forecast: What loads are planned for: their "mean" (the default), "ema" or "last".
        policy: Policy of the simulator whose plan is taken, such as ema.home.quota.
        step: Step of the simulator whose plan is taken; by default the last.
        model: Folder or hub id of the model, whose config.json tells its layers.
        layers: Numbers of the model's MoE layers among all its layers, such as "3-60"; with a model, of those that were
            recorded, where they are not all.
        hidden_layers: Layers of the model, dense ones counted.

    Raises:
        ValueError: If the plan cannot be read, the engine's rules cannot hold, or the engine needs to know layers that
            neither the plan nor the arguments name.
    """
    check_choice("engine", engine, get_args(Engine))
    known = model_layers(model, layers, hidden_layers)
    options = Options(num_devices, num_redundant_experts, forecast, policy, step)
    return _write(_saved(plan, options, known), known, engine, Path(path))


def _saved(plan: Any, options: Options, known: ModelLayers) -> SavedPlan:
    if isinstance(plan, (Path, str)):
        return open_source(Path(plan), options, known)
    if isinstance(plan, (ReplicationPlan, SavedPlan)):
        options.refuse(("devices", "redundant", "forecast", "policy", "step"), "a plan")
        return plan if isinstance(plan, SavedPlan) else SavedPlan(plan)
    options.refuse(("policy", "step"), "loads")
    settings = {"num_devices": options.devices, "num_redundant_experts": options.redundant}
    given = {name: value for name, value in settings.items() if value is not None}
    return SavedPlan(plan_from_loads(np.asarray(plan), forecast=options.forecast or FORECAST, **given))


def _write(saved: SavedPlan, known: ModelLayers, engine: Engine, path: Path) -> Exported:
    whole, form = for_model(saved, known), FORMATS[engine]
    empty, twice = refilled(whole.plan)
    if engine != "switchcast":
        whole = SavedPlan(exportable(whole.plan), whole.layers)
    text = form.text(whole)
    if path.suffix != form.suffix:
        raise ValueError(f"{path} ends in '{path.suffix}', {engine} reads {form.suffix}; name another file")
    write_text(path, text)
    unplanned = len(whole.plan.phy2log) - len(saved.plan.phy2log)
    return Exported(path, whole, [*form.flags(whole, path), *_rows_for(whole, form)], empty, twice, unplanned)


def _rows_for(saved: SavedPlan, form: EngineFormat) -> list[str]:
    """Which model the rows are right for, unless a model was given."""
    count, numbers, layers = len(saved.plan.phy2log), saved.layers.numbers, saved.layers.hidden_layers
    if saved.layers.model or form.name == "switchcast":
        return []
    mend = "give --model FOLDER, and --layers if only some of its layers were recorded"
    if form.name == "sglang":
        right = f"{layers} rows, right if all layers but {runs(numbers)} are dense; SGLang uses no rows of those"
        return [f"{right}; {mend}"] if layers != count else []
    which = "which these are was not given" if numbers is None else f"these are {runs(numbers)}"
    return [
        f"{count} rows, right for a model with {count} MoE layers and no more ({which}); with others, "
        f"{form.consequences['layers']}; {mend}"
    ]
