"""Where expert weights come from: the modules of a live model, or its files, expert by expert."""

from typing import Any, Protocol

from torch import Tensor

from data.models.layout import MoELayout
from data.models.weights import ModelWeights


class ExpertSource(Protocol):
    """Gives one expert's weights at a time, so that nobody needs to hold all of them."""

    def fill(self, layer: int, expert: int, wi_FD: Tensor, wo_DF: Tensor) -> None:
        """Writes an expert's weights into the place where it lives for good."""
        ...

    def release(self) -> None:
        """Called when the places are given up."""
        ...


class ModuleWeights:
    """The experts of a model in memory.

    Their weights become views of the places they are copied to, so nothing is held twice and the plain model still
    runs; `release` gives each of them storage of its own again, bit for bit what it was.

    Raises:
        ValueError: If another engine has them.
    """

    def __init__(self, model: Any, layout: MoELayout) -> None:
        self._layers = [list(model.get_submodule(f"{name}.experts").children()) for name in layout.module_names]
        if any(len(layer) != layout.num_experts for layer in self._layers):
            raise ValueError("another engine runs this model; close that one first")
        self._moved: list[Any] = []

    def fill(self, layer: int, expert: int, wi_FD: Tensor, wo_DF: Tensor) -> None:
        """See `ExpertSource`."""
        module = self._layers[layer][expert]
        for parameter, place in ((module.wi.weight, wi_FD), (module.wo.weight, wo_DF)):
            place.copy_(parameter.detach())
            parameter.data = place
            self._moved.append(parameter)

    def release(self) -> None:
        """See `ExpertSource`."""
        while self._moved:
            parameter = self._moved.pop()
            parameter.data = parameter.data.clone()


class FileWeights:
    """The experts in a model's files; each is read when a place wants it, and nothing else is.

    Args:
        weights: The model's files.
        layout: Its MoE layers.
    """

    def __init__(self, weights: ModelWeights, layout: MoELayout) -> None:
        self._weights, self._names = weights, layout.module_names

    def fill(self, layer: int, expert: int, wi_FD: Tensor, wo_DF: Tensor) -> None:
        """See `ExpertSource`.

        Raises:
            ValueError: If the files lack the expert, or hold another shape.
        """
        for part, place in (("wi", wi_FD), ("wo", wo_DF)):
            name = f"{self._names[layer]}.experts.expert_{expert}.{part}.weight"
            stored = self._weights.read(name)
            if stored.shape != place.shape:
                raise ValueError(
                    f"{self._weights.files[name]}: {name} is {tuple(stored.shape)}, expected {tuple(place.shape)}"
                )
            place.copy_(stored)

    def release(self) -> None:
        """See `ExpertSource`."""
