"""ExpertReader: reads single experts from a model's safetensors files, however its family stores them.

Switch stores each matrix of each expert. Of the other families most store the gate and the other half of the first
matrix apart, too, and some stack all experts in one tensor; transformers' table of conversions says which. An expert
goes through the same conversions here as all experts together go through when transformers loads the model.
"""

from collections import defaultdict
from copy import deepcopy
from typing import Any, Protocol

from torch import Tensor

from data.models.expert import ExpertFormat
from data.models.layout import SWITCH, MoELayout
from data.models.weights import ModelWeights


class ExpertReader(Protocol):
    """Reads the tensors of one expert; see `ExpertFormat` for their order."""

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
        self._weights, self._layout, self._format = weights, layout, form

    def read(self, layer: int, expert: int) -> list[Tensor]:
        """Reads one expert; see `ExpertReader.read`."""
        names = [f"{self._layout.modules[layer]}.expert_{expert}.{name}" for name in self._format.names]
        tensors = [self._weights.read(name) for name in names]
        for name, tensor, shape in zip(names, tensors, self._format.shapes, strict=True):
            check_shape(f"{self._weights.files[name]}: {name}", tensor, shape)
        return tensors


class StoredFamily:
    """Experts in the files of a family with the experts interface, converted as transformers does."""

    def __init__(self, weights: ModelWeights, model: Any, layout: MoELayout, form: ExpertFormat) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self._weights, self._model, self._layout, self._format = weights, model, layout, form
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

    def read(self, layer: int, expert: int) -> list[Tensor]:
        """Reads one expert; see `ExpertReader.read`."""
        tensors = []
        for name, shape in zip(self._format.names, self._format.shapes, strict=True):
            target = f"{self._layout.modules[layer]}.{name}"
            tensor = self._read(target, expert)
            check_shape(f"{self._weights.model}: expert {expert} of {target}", tensor, shape)
            tensors.append(tensor)
        return tensors

    def _read(self, target: str, expert: int) -> Tensor:
        """One tensor of one expert: its row of a stack, or what its own tensors are converted to."""
        sources = self._sources[target]
        if None in sources:
            return self._weights.read_row(sources[None][0], expert)
        patterns = {pattern: names for pattern, names in sources.items() if pattern is not None}
        converter = deepcopy(self._converters[next(iter(patterns))])
        for pattern, names in patterns.items():
            if "*" in pattern and expert >= len(names):
                raise ValueError(f"{self._weights.model} stores {len(names)} experts of {target}, not expert {expert}")
            part = (
                self._weights.read(names[expert]) if "*" in pattern else self._weights.read_row(names[0], expert)[None]
            )
            converter.add_tensor(target, names[0], pattern, part)
        converted = converter.convert(target, model=self._model, config=self._model.config)[target]
        whole: Tensor = converted[0] if isinstance(converted, list) else converted
        return whole[0]


def check_shape(what: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape.

    Raises:
        ValueError: If the shapes differ.
    """
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{what} is {tuple(tensor.shape)}, expected {expected}")
