"""What an engine would do with a plan file: `check_plan`, and the command.

    switchcast check-plan plan.json --devices 8 --model FOLDER

recognises plans of SGLang, vLLM, TensorRT-LLM and vllm-ascend, and our own. Exit code 0: nothing found; 1: problems
found; 2: the file cannot be read, or an option is wrong.

Shape suffixes: P slots.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from data.arguments import check_whole
from data.arrays import MOST_EXPERTS
from data.cli import from_command_line, print_json, user_errors
from runtime.balancing.plan import EMPTY
from runtime.balancing.plan_file import MOST_LAYERS
from runtime.export.engine_plan import EnginePlan
from runtime.export.formats import FORMATS, read_engine_plan
from runtime.export.model_layers import ModelLayers, model_layers


@dataclass(frozen=True)
class CheckedPlan:
    """A plan file and what was found in it.

    Attributes:
        plan: Its maps, as the engine reads them.
        problems: What the engine would refuse, or get wrong without a word, a line each.
        notes: What was not checked, and what the engine needs besides.
    """

    plan: EnginePlan
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_plan(
    path: Path | str,
    num_devices: int | None = None,
    num_experts: int | None = None,
    num_redundant_experts: int | None = None,
    hidden_layers: int | None = None,
    model: str | None = None,
    layers: str | None = None,
) -> CheckedPlan:
    """Reads a plan file and finds what its engine would refuse, or get wrong without a word.

    Args:
        path: The file.
        num_devices: Devices that it is for (expert parallel size); needed for some checks where the file names none.
        num_experts: Experts of a layer; by default one more than the largest in the file.
        num_redundant_experts: Redundant experts that the engine is started with.
        hidden_layers: Layers of the model, dense ones counted.
        model: Folder or hub id of the model, whose config.json tells experts and layers.
        layers: Numbers of the model's MoE layers among all its layers, such as "3-60".

    Raises:
        ValueError: If the file cannot be read as a plan, or a number is none.
    """
    for name, value, most in (
        ("num_devices", num_devices, MOST_EXPERTS), ("num_experts", num_experts, MOST_EXPERTS),
        ("hidden_layers", hidden_layers, MOST_LAYERS),
    ):  # fmt: skip
        if value is not None:
            check_whole(name, value, 1, most)
    if num_redundant_experts is not None:
        check_whole("num_redundant_experts", num_redundant_experts, 0)
    known = model_layers(model, layers, hidden_layers)
    plan = read_engine_plan(Path(path))
    if num_devices and plan.num_devices and num_devices != plan.num_devices:
        raise ValueError(f"{path} is for {plan.num_devices} devices, {num_devices} were given")
    devices, notes = num_devices or plan.num_devices, list(plan.notes)
    largest = max(max(row) for row in plan.rows.values()) + 1
    experts = num_experts or known.num_experts
    if devices is None:
        notes.append("not checked: whether slots divide and no device holds an expert twice; give --devices")
    if experts is None:
        notes.append(f"not checked: whether there are experts above {largest - 1}; give --experts or --model")
    if num_redundant_experts is None:
        notes.append("not checked: whether slots are as many as the engine is started with; give --redundant")
    notes += _unchecked(plan, known)
    experts = experts or max(1, largest)
    problems = [*plan.problems, *_of_layers(plan, known)]
    problems += _of_slots(plan, experts, devices, num_redundant_experts)
    return CheckedPlan(plan, problems, notes)


def _unchecked(plan: EnginePlan, known: ModelLayers) -> Iterator[str]:
    """What could not be checked about the layers, and the option that checks it."""
    if plan.engine == "switchcast":
        yield "not checked: whether the rows are for the model's layers; export does, with --model or --layers"
    elif plan.engine == "sglang" and known.hidden_layers is None:
        yield "not checked: whether each layer of the model has a row; give --model or --hidden-layers"
    elif plan.engine != "sglang" and known.numbers is None and not plan.shared:
        yield "not checked: whether the model's MoE layers have a row each; give --model or --layers"


def _of_layers(plan: EnginePlan, known: ModelLayers) -> Iterator[str]:
    """Problems with the number of rows, or with the layers that they are for."""
    if plan.engine == "switchcast" or plan.shared:
        return
    there, numbers, hidden = list(plan.rows), known.numbers, known.hidden_layers
    consequence = FORMATS[plan.engine].consequences["layers"]
    if plan.engine == "sglang":
        if hidden not in (None, len(there)):
            yield f"has {len(there)} rows for a model of {hidden} layers: {consequence}"
        elif numbers is not None and numbers[-1] >= len(there):
            yield f"has {len(there)} rows for a model with the MoE layer {numbers[-1]}: {consequence}"
    elif numbers is None:
        if hidden is not None and max(there) >= hidden:
            yield f"has a row for layer {max(there)} of a model of {hidden} layers: {consequence}"
    elif not FORMATS[plan.engine].counts_dense:
        if len(there) != len(numbers):
            yield f"has {len(there)} layers for a model of {len(numbers)} MoE layers: {consequence}"
    elif odd := sorted(set(there) ^ set(numbers)):
        kind = "lacks" if odd[0] in numbers else "has a row for"
        yield f"{kind} layer {odd[0]} ({len(odd)} layers differ from the model's MoE layers): {consequence}"


def _of_slots(plan: EnginePlan, experts: int, devices: int | None, redundant: int | None) -> Iterator[str]:
    """Problems with what the rows hold: the first of each kind, and how many more there are."""
    consequences = FORMATS[plan.engine].consequences
    widths = Counter(len(row) for row in plan.rows.values())
    slots = plan.num_slots or widths.most_common(1)[0][0]
    first, more = dict[str, str](), Counter[str]()
    for layer, row in plan.rows.items():
        for kind, said in _mistakes(row, slots, experts, devices):
            if kind in consequences:
                first.setdefault(kind, f"layer {layer} {said}")
                more[kind] += 1
    for kind, said in first.items():
        others = f" ({more[kind] - 1} more layers or experts)" if more[kind] > 1 else ""
        yield f"{said}{others}: {consequences[kind]}"
    if devices and slots % devices and "division" in consequences:
        yield f"has {slots} slots, which do not divide over {devices} devices: {consequences['division']}"
    if redundant is not None and slots != experts + redundant:
        yield (
            f"has {slots} slots for {experts} experts, which is {slots - experts} redundant experts, not {redundant}: "
            f"start the engine with {slots - experts}"
        )


def _mistakes(row: Sequence[int], slots: int, experts: int, devices: int | None) -> Iterator[tuple[str, str]]:
    """Kind and description of each mistake in one layer's row."""
    if len(row) != slots:
        yield "length", f"has {len(row)} slots, expected {slots}"
    if EMPTY in row:
        yield "empty", f"has an empty slot (-1), slot {list(row).index(EMPTY)}"
    if (largest := max(row)) >= experts:
        yield "range", f"holds expert {largest}, expected 0 to {experts - 1}"
    for expert in sorted(set(range(experts)) - set(row)):
        yield "missing", f"has no slot for expert {expert}"
    if devices and len(row) % devices == 0:
        size = len(row) // devices
        for device in range(devices):
            held = Counter(expert for expert in row[device * size : (device + 1) * size] if expert != EMPTY)
            for expert in sorted(expert for expert, copies in held.items() if copies > 1):
                yield "twice", f"has expert {expert} twice on device {device}"


def check(
    file: Path,
    devices: int | None = None,
    experts: int | None = None,
    redundant: int | None = None,
    layers: str | None = None,
    hidden_layers: int | None = None,
    model: str | None = None,
) -> CheckedPlan:
    """Says what an engine would refuse in a plan file, or get wrong without a word.

    Args:
        file: Plan of SGLang (.json, .pt), vLLM (.json), TensorRT-LLM (.yaml), vllm-ascend (.json), or our own (.json).
        devices: Devices of expert parallelism, where the file does not name them.
        experts: Experts of a layer; by default one more than the largest in the file.
        redundant: Redundant experts that the engine is started with.
        layers: Numbers of the model's MoE layers among all its layers, such as 3-60.
        hidden_layers: Layers of the model, dense ones counted.
        model: Folder or hub id of the model, whose config.json tells experts and layers.
    """
    return check_plan(file, devices, experts, redundant, hidden_layers, model, layers)


def main() -> None:
    """Command line of `check-plan`: the problems, then one JSON document."""
    with user_errors():
        found = from_command_line(check)
    plan, console = found.plan, Console(stderr=True, highlight=False, soft_wrap=True)
    size = f"{len(plan.rows)} rows of {len(next(iter(plan.rows.values())))} slots"
    console.print(f"a plan of {plan.engine}: {size}", markup=False)
    for line in found.problems:
        console.print(f"problem: {line}", markup=False)
    for line in found.notes:
        console.print(f"note: {line}", markup=False)
    if not found.problems:
        console.print("nothing wrong was found", markup=False)
    document: dict[str, Any] = {"engine": plan.engine, "layers": len(plan.rows), "problems": found.problems}
    print_json(document | {"notes": found.notes})
    raise SystemExit(1 if found.problems else 0)


if __name__ == "__main__":
    main()
