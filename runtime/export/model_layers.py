"""Which layers of a model are MoE layers: from its config.json, or as the user says.

Engines count layers differently, with or without the dense ones. What is not known is asked for, never guessed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        recorded: Numbers of the MoE layers that were recorded, where the user says that they are not all.
    """

    numbers: tuple[int, ...] | None = None
    hidden_layers: int | None = None
    num_experts: int | None = None
    name: str = ""
    fingerprint: str = ""
    recorded: tuple[int, ...] | None = None

    def of_rows(self, source: str, layers: Sequence[int], count: int) -> tuple[int, ...] | None:
        """Numbers of the layers that a plan's rows are for; None where nothing is known of the model.

        Args:
            source: What has the rows, and how many, for errors.
            layers: Which of the source's layers have a row: those with tokens.
            count: Layers of the source: the MoE layers of the model, those that the user names, or all, dense ones too.

        Raises:
            ValueError: If it has another number of layers.
        """
        named = self.recorded or self.numbers
        if named is not None and len(named) == count:
            return tuple(named[layer] for layer in layers)
        if self.hidden_layers == count or (named is not None and named == tuple(layers)):
            return tuple(layers)
        if named is None and self.hidden_layers is None:
            return None
        if named is None:
            raise ValueError(
                f"{source}, the model {self.hidden_layers} (--hidden-layers); name its MoE layers with --layers, such "
                "as 3-60, or give --model FOLDER"
            )
        raise ValueError(
            f"{source}, {self.name or '--layers'} has {len(named)} MoE layers ({runs(named)}), and which of them were "
            f"recorded is not known; name those with --layers{'' if self.name else ', and give --model FOLDER'}"
        )


def model_layers(model: str | None, layers: str | None, hidden_layers: int | None) -> ModelLayers:
    """What the options tell.

    Args:
        model: Folder or hub id of the model, of which config.json is read.
        layers: Numbers of its MoE layers, such as "3-60" or "0,2,4-8"; with a model, of those that were recorded.
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
    if numbers is None:
        return found
    if odd := sorted(set(numbers) - set(found.numbers or ())):
        raise ValueError(
            f"--layers names layer {odd[0]}, {model} has the MoE layers {runs(found.numbers)}; name some of them, or "
            "leave --layers out"
        )
    return replace(found, recorded=numbers)


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
    plan, planned, layers = saved.plan, saved.layers.numbers, saved.layers.hidden_layers
    if known.num_experts not in (None, plan.num_experts):
        raise ValueError(f"{known.name} has {known.num_experts} experts a layer, the plan has {plan.num_experts}")
    if layers is not None and known.hidden_layers not in (None, layers):
        raise ValueError(
            f"the plan is for a model of {layers} layers, {known.name or '--hidden-layers'} says "
            f"{known.hidden_layers}; give the model that was recorded"
        )
    if planned is None:
        count = len(plan.phy2log)
        known = replace(known, hidden_layers=known.hidden_layers or layers)
        planned = known.of_rows(f"the plan has {count} layers", range(count), count)
    elif known.recorded not in (None, planned):
        raise ValueError(f"the plan is for layers {runs(planned)}, --layers names {runs(known.recorded)}; leave it out")
    numbers = known.numbers if known.numbers is not None else planned
    if planned is not None and (odd := sorted(set(planned) - set(numbers or ()))):
        raise ValueError(f"the plan has a row for layer {odd[0]}, which is no MoE layer ({runs(numbers)})")
    whole = PlannedLayers(
        numbers, known.hidden_layers or layers, known.name or saved.layers.model,
        known.fingerprint or saved.layers.fingerprint,
    )  # fmt: skip
    if numbers is None or planned is None or len(numbers) == len(planned):
        return SavedPlan(plan, whole)
    bare = own_order(plan.num_experts, plan.phy2log.shape[1])
    rows = dict(zip(planned, plan.phy2log.tolist(), strict=True))
    phy2log = np.array([rows.get(number, bare) for number in numbers])
    return SavedPlan(ReplicationPlan(phy2log, plan.num_devices), whole)


def runs(numbers: Sequence[int] | None) -> str:
    """Numbers as ranges: 0, 3, 4, 5 is "0,3-5"."""
    runs: list[list[int]] = []
    for number in numbers or ():
        if runs and number == runs[-1][-1] + 1:
            runs[-1][-1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
