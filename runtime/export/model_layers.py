"""Which layers of a model are MoE layers: from its config.json, or as the user says.

Engines count layers differently, with or without the dense ones. What is not known is asked for, never guessed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.arguments import check_whole
from runtime.balancing.plan import ReplicationPlan
from runtime.balancing.plan_file import MOST_LAYERS, PlannedLayers, SavedPlan
from runtime.export.filling import own_order


@dataclass(frozen=True)
class ModelLayers:
    """What is known of a model's layers; None where it is not.

    Attributes:
        numbers: Numbers of its MoE layers among all layers, dense ones counted.
        hidden_layers: Layers, dense ones counted.
        num_experts: Experts of a MoE layer.
        name: The model's name.
        fingerprint: Its fingerprint.
    """

    numbers: tuple[int, ...] | None = None
    hidden_layers: int | None = None
    num_experts: int | None = None
    name: str = ""
    fingerprint: str = ""

    def planned(self) -> PlannedLayers:
        """The same for a plan of all MoE layers."""
        return PlannedLayers(self.numbers, self.hidden_layers, self.name, self.fingerprint)


def model_layers(model: str | None, layers: str | None, hidden_layers: int | None) -> ModelLayers:
    """What the options tell.

    Args:
        model: Folder or hub id of the model, of which config.json is read.
        layers: Numbers of its MoE layers, such as "3-60" or "0,2,4-8".
        hidden_layers: Layers, dense ones counted.

    Raises:
        ValueError: If the model cannot be read, or the options contradict it or each other.
    """
    numbers = None if layers is None else parse_numbers(layers)
    if hidden_layers is not None:
        check_whole("hidden_layers", hidden_layers, 1, MOST_LAYERS)
        if numbers and numbers[-1] >= hidden_layers:
            raise ValueError(
                f"--layers names layer {numbers[-1]} of a model of {hidden_layers} layers (0 is the first)"
            )
    if model is None:
        return ModelLayers(numbers, hidden_layers)
    found = _read(model)
    if hidden_layers not in (None, found.hidden_layers):
        raise ValueError(f"{model} has {found.hidden_layers} layers, --hidden-layers is {hidden_layers}; leave one out")
    if numbers not in (None, found.numbers):
        raise ValueError(f"{model} has the MoE layers {_runs(found.numbers)}, --layers is {layers}; leave one out")
    return found


def _read(model: str) -> ModelLayers:
    from data.models.model import outline  # transformers takes seconds to import

    loaded = outline(model, quantised=True)  # no weights are read
    layout, config = loaded.layout, loaded.model.config.get_text_config()
    if not layout.causal:
        raise ValueError(f"{model} is a {layout.family} model, which none of the engines serves")
    numbers = tuple(block for _, block in layout.layers)
    return ModelLayers(numbers, int(config.num_hidden_layers), layout.num_experts, model)


def parse_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers and ranges, both ends included: "0,2,4-6" is 0, 2, 4, 5, 6.

    Raises:
        ValueError: If the text is something else, or the numbers do not ascend.
    """
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text):
        raise ValueError(f"--layers is '{text}', expected numbers and ranges such as 3-60 or 0,2,4-8")
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    numbers = tuple(number for part in ends for number in range(part[0], part[-1] + 1))
    if not numbers or list(numbers) != sorted(set(numbers)):
        raise ValueError(f"--layers is '{text}', expected numbers that ascend")
    return numbers


def for_model(saved: SavedPlan, known: ModelLayers) -> SavedPlan:
    """The plan with a row for each MoE layer of the model.

    Layers that were not planned, because they got no tokens, have their experts in their own order, and no replicas.

    Raises:
        ValueError: If plan and model do not fit.
    """
    plan, planned = saved.plan, saved.layers.numbers
    if known.num_experts not in (None, plan.num_experts):
        raise ValueError(f"{known.name} has {known.num_experts} experts a layer, the plan has {plan.num_experts}")
    numbers = known.numbers if known.numbers is not None else planned
    if planned is None and numbers is not None and len(numbers) != len(plan.phy2log):
        raise ValueError(
            f"the plan has {len(plan.phy2log)} layers, {known.name or '--layers'} {len(numbers)} MoE layers "
            f"({_runs(numbers)}), and the plan does not say which of them it is for"
        )
    if planned is not None and (odd := sorted(set(planned) - set(numbers or ()))):
        raise ValueError(f"the plan has a row for layer {odd[0]}, which is no MoE layer ({_runs(numbers)})")
    layers = PlannedLayers(
        numbers, known.hidden_layers or saved.layers.hidden_layers, known.name or saved.layers.model,
        known.fingerprint or saved.layers.fingerprint,
    )  # fmt: skip
    if numbers is None or planned is None or len(numbers) == len(planned):
        return SavedPlan(plan, layers)
    bare = own_order(plan.num_experts, plan.phy2log.shape[1])
    rows = dict(zip(planned, plan.phy2log.tolist(), strict=True))
    phy2log = np.array([rows.get(number, bare) for number in numbers])
    return SavedPlan(ReplicationPlan(phy2log, plan.num_devices), layers)


def _runs(numbers: Sequence[int] | None) -> str:
    """Numbers as ranges: 0, 3, 4, 5 is "0,3-5"."""
    runs: list[list[int]] = []
    for number in numbers or ():
        if runs and number == runs[-1][-1] + 1:
            runs[-1][-1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
