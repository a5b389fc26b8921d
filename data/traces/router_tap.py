"""RouterTap: forward hooks on a Switch model's routers; the same one logs traces offline and feeds the runtime."""

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from data.models.layout import MoELayout


@dataclass(frozen=True)
class RouterCall:
    """What a router did once; padding is routed like any token.

    Attributes:
        experts: Expert of each position, int16 `[B, T]`.
        kept: Whether the position fitted into its expert's capacity, bool `[B, T]`.
        probability: Router probability of that expert, `[B, T]`.
        top_experts: The likeliest experts, likeliest first, int16 `[B, T, K]`; K is 0 where they were not asked for.
        top_probability: Their router probabilities, `[B, T, K]`.
    """

    experts: Tensor
    kept: Tensor
    probability: Tensor
    top_experts: Tensor
    top_probability: Tensor


class RouterTap:
    """Records where every token goes, layer by layer, without copying anything off the device.

    Used as a context manager; hooks are removed at the end. `take` empties it.

    Args:
        model: The model.
        layout: Its MoE layers.
        top: K, how many of a token's likeliest experts are kept with their probabilities.
    """

    def __init__(self, model: nn.Module, layout: MoELayout, top: int = 0) -> None:
        if not 0 <= top <= layout.num_experts:
            raise ValueError(f"top is {top}, expected 0 to {layout.num_experts}, the model's experts")
        self.layout, self.top = layout, top
        self._calls: list[list[RouterCall]] = [[] for _ in layout.layers]
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
            one_hot_BTE, probability_BT1, logits_BTE = (tensor.detach() for tensor in output)
            # The router takes the argmax of probabilities in the dtype of its input, where ties can hide.
            share_BTE = logits_BTE.softmax(-1).to(probability_BT1.dtype)
            experts_BT = share_BTE.argmax(-1).to(torch.int16)
            top = share_BTE.topk(self.top, -1)
            kept_BT, probability_BT = one_hot_BTE.any(-1), probability_BT1[..., 0]
            call = RouterCall(experts_BT, kept_BT, probability_BT, top.indices.to(torch.int16), top.values)
            self._calls[layer].append(call)

        return record

    def take(self) -> list[list[RouterCall]]:
        """What was recorded since the last take: for each MoE layer, its router's calls."""
        calls, self._calls = self._calls, [[] for _ in self.layout.layers]
        return calls
