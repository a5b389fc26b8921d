"""Sources of expert weights: the modules of a model in memory, or the model's files, read expert by expert."""

from typing import Any, Protocol

from torch import Tensor

from data.models.layout import MoELayout
from data.models.weights import ModelWeights


class ExpertSource(Protocol):
    """Provides the weights of one expert at a time, so that a process need not hold all experts."""

    def fill(self, layer: int, expert: int, wi_FD: Tensor, wo_DF: Tensor) -> None:
        """Writes an expert's weights into the buffer of its home slot."""
        ...

    def release(self) -> None:
        """Called when the buffers are about to be freed."""
        ...


class ModuleWeights:
    """The experts of a model in memory.

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

    def fill(self, layer: int, expert: int, wi_FD: Tensor, wo_DF: Tensor) -> None:
        module = self._layers[layer][expert]
        for parameter, buffer in ((module.wi.weight, wi_FD), (module.wo.weight, wo_DF)):
            buffer.copy_(parameter.detach())
            parameter.data = buffer
            self._views.append(parameter)

    def release(self) -> None:
        while self._views:
            parameter = self._views.pop()
            parameter.data = parameter.data.clone()


class FileWeights:
    """The experts in a model's files; only the experts that a buffer asks for are read.

    Args:
        weights: The model's files.
        layout: Its MoE layers.
    """

    def __init__(self, weights: ModelWeights, layout: MoELayout) -> None:
        self._weights, self._names = weights, layout.modules

    def fill(self, layer: int, expert: int, wi_FD: Tensor, wo_DF: Tensor) -> None:
        """Reads one expert.

        Raises:
            ValueError: If the files lack the expert or store it in another shape.
        """
        for part, buffer in (("wi", wi_FD), ("wo", wo_DF)):
            name = f"{self._names[layer]}.expert_{expert}.{part}.weight"
            stored = self._weights.read(name)
            if stored.shape != buffer.shape:
                raise ValueError(
                    f"{self._weights.files[name]}: {name} is {tuple(stored.shape)}, expected {tuple(buffer.shape)}"
                )
            buffer.copy_(stored)

    def release(self) -> None:
        """Nothing refers to the buffers."""
