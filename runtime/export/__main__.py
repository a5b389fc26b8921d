"""Writes a plan for the engine that serves: SGLang, vLLM, TensorRT-LLM or vllm-ascend.

    switchcast export outputs/plans.npz --policy ema.home.quota --to sglang --model FOLDER
    switchcast export recording.pt --devices 8 --redundant 16 --to tensorrt-llm
    python counts.py | switchcast export - --to vllm

prints the engine's options that go with the file and, in a pipe, one JSON document. docs/export.md has the formats.
"""

from pathlib import Path
from typing import Any

from rich.console import Console

from data.cli import from_command_line, print_json, user_errors
from data.shell import typed
from runtime.export.export import Engine, Exported, export_plan
from runtime.export.formats import FORMATS


def export(
    plan: Path,
    to: Engine | None = None,
    out: Path | None = None,
    devices: int | None = None,
    redundant: int | None = None,
    forecast: str | None = None,
    policy: str | None = None,
    step: int | None = None,
    model: str | None = None,
    layers: str | None = None,
    hidden_layers: int | None = None,
) -> Exported:
    """Writes a plan as the file that an engine reads. Loads are planned first.

    Args:
        plan: Saved plan (.json), plans of `simulate --save-plans` (.npz), trace folder, recording that
            `data/traces/loads.py` lists, or - for loads on standard input: .npy, or a step's JSON on each line.
        to: The engine; switchcast is our own plan file.
        out: The file; by default outputs/plan-ENGINE.json, or .yaml for tensorrt-llm.
        devices: Devices that loads are planned for; by default 8.
        redundant: Redundant experts of a layer that loads are planned with; by default 16.
        forecast: What loads are planned for: their mean (the default), ema or last.
        policy: Policy of the simulator whose plan is taken, such as ema.home.quota.
        step: Step of the simulator whose plan is taken; by default the last.
        model: Folder or hub id of the model, whose config.json tells its layers.
        layers: Numbers of the model's MoE layers among all its layers, such as 3-60; with --model, of those that were
            recorded, where they are not all.
        hidden_layers: Layers of the model, dense ones counted.
    """
    if to is None:
        raise ValueError(f"--to is missing, expected one of {', '.join(FORMATS)}")
    return export_plan(
        plan, to, out or Path("outputs") / f"plan-{to}{FORMATS[to].suffix}", num_devices=devices,
        num_redundant_experts=redundant, forecast=forecast, policy=policy, step=step, model=model, layers=layers,
        hidden_layers=hidden_layers,
    )  # fmt: skip


def main() -> None:
    """Command line of `export`: the file, its options, then one JSON document."""
    with user_errors():
        done = from_command_line(export)
    plan, console = done.saved.plan, Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"Wrote {done.path}: {len(plan.phy2log)} MoE layers, {plan.num_experts} experts in {plan.phy2log.shape[1]} "
        f"slots on {plan.num_devices} devices"
    )
    counts = {
        "empty slots were filled": done.empty,
        "slots held a second copy on their device and were filled anew": done.twice,
        "MoE layers were not planned: their experts lie in their own order": done.unplanned,
    }
    for what, count in counts.items():
        if count:
            console.print(f"{count} {what}")
    for line in done.flags:
        console.print(typed(line))
    document: dict[str, Any] = {"plan": str(done.path), "flags": done.flags, "devices": plan.num_devices}
    document |= {"redundant": plan.num_redundant_experts, "layers": len(plan.phy2log), **{"filled": done.empty}}
    print_json(document | {"refilled": done.twice, "unplanned": done.unplanned})


if __name__ == "__main__":
    main()
