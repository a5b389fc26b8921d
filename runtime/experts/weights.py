"""Sources of expert weights: the modules of a model in memory, or the model's files, read expert by expert."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from data.models.expert import ExpertFormat
from data.models.layout import MoELayout
from data.models.stored_experts import ExpertReader


class ExpertSource(Protocol):
    """Provides the weights of one expert at a time, so that a process need not hold all experts."""

    def fill(self, layer: int, expert: int, buffers: Sequence[Tensor]) -> None:
        """Writes an expert's tensors into the buffer of its home slot; see `ExpertFormat` for their order."""
        ...

    def whole(self, layer: int) -> Sequence[Tensor] | None:
        """All experts' tensors of a layer, in order, if they may be computed with as they are; else None."""
        ...

    def release(self) -> None:
        """Called when the buffers are about to be freed."""
        ...


class ModuleWeights:
    """The experts of a Switch model in memory, each of them a module.

    After `fill` an expert's parameters are views of the buffer they were copied to, so that no weight is held twice and
    the unmodified model still runs. `release` gives every parameter storage of its own again, with equal bits.

    Raises:
        ValueError: If another engine runs the model.
    """

    def __init__(self, model: Any, layout: MoELayout) -> None:
        self._layers = [list(model.get_submodule(name).children()) for name in layout.modules]
        if any(len(layer) != layout.num_experts for layer in self._layers):
            raise ValueError("another engine runs this model; close that one first")
        self._views: list[Any] = []

    def fill(self, layer: int, expert: int, buffers: Sequence[Tensor]) -> None:
        module = self._layers[layer][expert]
        for parameter, buffer in zip((module.wi.weight, module.wo.weight), buffers, strict=True):
            buffer.copy_(parameter.detach())
            parameter.data = buffer
            self._views.append(parameter)

    def whole(self, layer: int) -> None:
        """None: the experts of a layer do not lie next to each other."""

    def release(self) -> None:
        while self._views:
            parameter = self._views.pop()
            parameter.data = parameter.data.clone()


class StackedWeights:
    """The experts of a live model whose experts modules stack all experts of a layer in one parameter.

    One device computes with these parameters as they are. Several devices need buffers of their own, because their
    replica slots lie between the homes: the weights are then held twice while the engine is open.
    """

    def __init__(self, model: Any, layout: MoELayout) -> None:
        names = ExpertFormat.of(model, layout).names
        modules = [model.get_submodule(name) for name in layout.modules]
        self._layers = [[module.get_parameter(name).detach() for name in names] for module in modules]

    def fill(self, layer: int, expert: int, buffers: Sequence[Tensor]) -> None:
        for stack, buffer in zip(self._layers[layer], buffers, strict=True):
            buffer.copy_(stack[expert])

    def whole(self, layer: int) -> Sequence[Tensor] | None:
        stacks = self._layers[layer]
        return stacks if all(stack.is_contiguous() for stack in stacks) else None

    def release(self) -> None:
        """The parameters were read only."""


class FileWeights:
    """The experts in a model's files; only the experts that a buffer asks for are read.

    Args:
        stored: The experts in the files.
    """

    def __init__(self, stored: ExpertReader) -> None:
        self._stored = stored

    def fill(self, layer: int, expert: int, buffers: Sequence[Tensor]) -> None:
        """Reads one expert.

        Raises:
            ValueError: If the files lack the expert or store it in another shape.
        """
        for buffer, tensor in zip(buffers, self._stored.read(layer, expert), strict=True):
            buffer.copy_(tensor)

    def whole(self, layer: int) -> None:
        """None: no process reads all experts."""

    def release(self) -> None:
        """Nothing refers to the buffers."""
