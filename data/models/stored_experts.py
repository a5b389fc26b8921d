"""ExpertReader: reads single experts from a model's safetensors files, however its family stores them.

Switch stores each matrix of each expert. Of the other families most store the gate and the other half of the first
matrix apart, too, and some stack all experts in one tensor; transformers' table of conversions says which. An expert
goes through the same conversions here as all experts together go through when transformers loads the model.

Nearly all of these conversions only put stored tensors one after the other. `parts` then names these tensors, so that a
caller can read their bytes itself, into memory of its own.
"""

from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from data.models.expert import ExpertFormat
from data.models.layout import SWITCH, MoELayout
from data.models.weights import ModelWeights


@dataclass(frozen=True)
class Part:
    """A stored tensor, or a row of one, that is part of an expert's tensor as it is.

    Attributes:
        name: Name of the stored tensor.
        row: Row on its first axis, which holds the experts; None means the whole tensor.
    """

    name: str
    row: int | None = None

    def __str__(self) -> str:
        return self.name if self.row is None else f"row {self.row} of {self.name}"


class ExpertReader(Protocol):
    """Reads the tensors of one expert; see `ExpertFormat` for their order."""

    weights: ModelWeights
    format: ExpertFormat

    def parts(self, layer: int, expert: int) -> list[list[Part]] | None:
        """What each tensor of an expert is stored as: its parts, one after the other along the first axis.

        None if a tensor has to be converted in another way; `read` does so.

        Raises:
            ValueError: If the files lack the expert.
        """
        ...

    def read(self, layer: int, expert: int) -> list[Tensor]:
        """Reads one expert.

        Raises:
            ValueError: If the files lack it, store it in another shape, or are damaged.
        """
        ...


def stored_experts(weights: ModelWeights, model: Any, layout: MoELayout) -> ExpertReader:
    """The experts in a model's files.

    Args:
        weights: The files.
        model: The model; it may have been loaded without its experts.
        layout: Its MoE layers.

    Raises:
        ValueError: If the files lack tensors of experts.
    """
    form = ExpertFormat.of(model, layout)
    return (
        StoredSwitch(weights, layout, form) if layout.family == SWITCH else StoredFamily(weights, model, layout, form)
    )


class StoredSwitch:
    """Experts in the files of a Switch Transformer: one tensor for each matrix."""

    def __init__(self, weights: ModelWeights, layout: MoELayout, form: ExpertFormat) -> None:
        self.weights, self.format, self._layout = weights, form, layout

    def parts(self, layer: int, expert: int) -> list[list[Part]]:
        """Each matrix is stored as it is; see `ExpertReader.parts`."""
        return [[Part(f"{self._layout.modules[layer]}.expert_{expert}.{name}")] for name in self.format.names]

    def read(self, layer: int, expert: int) -> list[Tensor]:
        """Reads one expert; see `ExpertReader.read`."""
        names = [part.name for (part,) in self.parts(layer, expert)]
        tensors = [self.weights.read(name) for name in names]
        for name, tensor, shape in zip(names, tensors, self.format.shapes, strict=True):
            check_shape(f"{self.weights.files[name]}: {name}", tensor, shape)
        return tensors


class StoredFamily:
    """Experts in the files of a family with the experts interface, converted as transformers does."""

    def __init__(self, weights: ModelWeights, model: Any, layout: MoELayout, form: ExpertFormat) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self.weights, self.format, self._model, self._layout = weights, form, model, layout
        steps = get_model_conversion_mapping(model)
        renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        converters = [step for step in steps if isinstance(step, WeightConverter)]
        self._converters: dict[str, Any] = {name: step for step in converters for name in step.source_patterns}
        targets, known = {f"{module}.{name}" for module in layout.modules for name in form.names}, model.state_dict()
        known |= dict.fromkeys(targets, True)
        self._sources: dict[str, dict[str | None, list[str]]] = {name: defaultdict(list) for name in targets}
        for stored in sorted(weights.files, key=dot_natural_key):  # as transformers sorts experts
            renamed, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
            if renamed in targets:
                self._sources[renamed][pattern].append(stored)
        if missing := sorted(name for name, found in self._sources.items() if not found):
            raise ValueError(f"{weights.model} lacks {len(missing)} tensors of experts, first {missing[0]}")

    def parts(self, layer: int, expert: int) -> list[list[Part]] | None:
        """Parts, unless a conversion does more than to put them one after the other; see `ExpertReader.parts`."""
        found = [self._parts(f"{self._layout.modules[layer]}.{name}", expert) for name in self.format.names]
        return None if None in found else [parts for parts in found if parts is not None]

    def _parts(self, target: str, expert: int) -> list[Part] | None:
        sources = self._sources[target]
        if None in sources:
            return [Part(sources[None][0], expert)]
        patterns = {pattern: names for pattern, names in sources.items() if pattern is not None}
        converter = self._converters[next(iter(patterns))]
        if not puts_together(converter):
            return None
        return [
            self._part(target, expert, pattern, patterns[pattern])
            for pattern in converter.source_patterns
            if pattern in patterns
        ]

    def _part(self, target: str, expert: int, pattern: str, names: list[str]) -> Part:
        """The part of an expert's tensor that is stored under one pattern: a tensor of its own, or a row of a stack."""
        if "*" not in pattern:
            return Part(names[0], expert)
        if len(names) != self._layout.num_experts:  # those behind the missing one would be taken for others
            held = {int([word for word in name.split(".") if word.isdigit()][-1]) for name in names}
            missing = next((number for number in range(self._layout.num_experts) if number not in held), len(names))
            raise ValueError(
                f"{self.weights.model} stores {len(names)} experts of {target}, not expert {missing}; its files are "
                "incomplete, download them again"
            )
        return Part(names[expert])

    def read(self, layer: int, expert: int) -> list[Tensor]:
        """Reads one expert; see `ExpertReader.read`."""
        tensors = []
        for name, shape in zip(self.format.names, self.format.shapes, strict=True):
            target = f"{self._layout.modules[layer]}.{name}"
            tensor = self._read(target, expert)
            check_shape(f"{self.weights.model}: expert {expert} of {target}", tensor, shape)
            tensors.append(tensor)
        return tensors

    def _read(self, target: str, expert: int) -> Tensor:
        """One tensor of one expert: its row of a stack, or what its own tensors are converted to."""
        sources = self._sources[target]
        if None in sources:
            return self.weights.read_row(sources[None][0], expert)
        patterns = {pattern: names for pattern, names in sources.items() if pattern is not None}
        converter = deepcopy(self._converters[next(iter(patterns))])
        for pattern, names in patterns.items():
            part = self._part(target, expert, pattern, names)
            tensor = (
                self.weights.read(part.name) if part.row is None else self.weights.read_row(part.name, part.row)[None]
            )
            converter.add_tensor(target, names[0], pattern, tensor)
        converted = converter.convert(target, model=self._model, config=self._model.config)[target]
        whole: Tensor = converted[0] if isinstance(converted, list) else converted
        return whole[0]


def puts_together(converter: Any) -> bool:
    """Whether a converter of transformers stacks experts, and puts each one's parts one after the other, at most.

    Stacked over the experts, the first axis of one expert is axis 1.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    stacks = all("*" in pattern for pattern in converter.source_patterns)
    steps = [(MergeModulelist, 0)] * stacks + [(Concatenate, 1)] * (len(converter.source_patterns) > 1)
    return [(type(step), getattr(step, "dim", None)) for step in converter.operations] == steps


def check_shape(what: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape.

    Raises:
        ValueError: If the shapes differ.
    """
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{what} is {tuple(tensor.shape)}, expected {expected}")
