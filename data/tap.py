"""RouterTap: forward hooks on a Switch model's routers; the same one logs traces offline and feeds the runtime."""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from data.layout import MoELayout


class RouterTap:
    """Records where every token goes, layer by layer, without copying anything off the device.

    Used as a context manager; hooks are removed at the end. `take` empties it.
    """

    def __init__(self, model: nn.Module, layout: MoELayout) -> None:
        self.layout = layout
        self._calls: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layout.layers]
        self._handles: list[Any] = []
        self._routers = [model.get_submodule(f"{name}.router") for name in layout.module_names]

    def __enter__(self) -> "RouterTap":
        for layer, router in enumerate(self._routers):
            self._handles.append(router.register_forward_hook(self._hook(layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, layer: int) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
            one_hot_BTE, probability_BT1, logits_BTE = output
            # The router takes the argmax of probabilities in the dtype of its input, where ties can hide.
            probabilities = logits_BTE.detach().softmax(-1).to(probability_BT1.dtype)
            kept_BT = one_hot_BTE.detach().any(-1)
            self._calls[layer].append((probabilities.argmax(-1).to(torch.int16), kept_BT))

        return record

    def take(self) -> list[list[tuple[Tensor, Tensor]]]:
        """What was recorded since the last take.

        Returns:
            For each MoE layer, one pair a call of its router: expert of each position (int16 `[B, T]`, padding routed
            like any token) and whether it fitted into the expert's capacity (bool `[B, T]`).
        """
        calls, self._calls = self._calls, [[] for _ in self.layout.layers]
        return calls
