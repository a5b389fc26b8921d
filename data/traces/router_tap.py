"""RouterTap: forward hooks that record the routing decisions of a Hugging Face Switch Transformer.

    with RouterTap(model, MoELayout.from_model(model, "my-model")) as tap:
        model.generate(**inputs)
    experts = [[call.experts for call in layer] for layer in tap.take()]

`python -m data.collect` logs traces with it. The runtime does not use it: its dispatch sees the routing anyway.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.models.layout import MoELayout


@dataclass(frozen=True)
class RouterCall:
    """Routing decisions of one forward call of one router; padding is routed like any token.

    Attributes:
        experts: Expert of each position, int16 `[B, T]`.
        kept: True for positions within their expert's capacity, bool `[B, T]`.
        probability: Router probability of that expert, `[B, T]`.
        top_experts: The K likeliest experts, likeliest first, int16 `[B, T, K]`; K is 0 by default.
        top_probability: Router probabilities of these experts, `[B, T, K]`.
    """

    experts: Tensor
    kept: Tensor
    probability: Tensor
    top_experts: Tensor
    top_probability: Tensor


class RouterTap:
    """Context manager that records the experts of every token, layer by layer; results stay on the model's device.

    The hooks are removed when the context ends. Outputs of the model do not change.

    Args:
        model: A `SwitchTransformersForConditionalGeneration`.
        layout: The model's MoE layers.
        top: Number K of likeliest experts recorded for each token with their probabilities.

    Raises:
        ValueError: If `top` is negative or above the number of experts.
    """

    def __init__(self, model: nn.Module, layout: MoELayout, top: int = 0) -> None:
        if not 0 <= top <= layout.num_experts:
            raise ValueError(f"top is {top}, expected 0 to {layout.num_experts}, the model's experts")
        self.layout, self.top = layout, top
        self._calls: list[list[RouterCall]] = [[] for _ in layout.layers]
        self._handles: list[Any] = []
        self._routers = [model.get_submodule(f"{name.removesuffix('experts')}router") for name in layout.modules]

    def __enter__(self) -> "RouterTap":
        for layer, router in enumerate(self._routers):
            self._handles.append(router.register_forward_hook(self._hook(layer)))
        return self

    def __exit__(self, *exc: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, layer: int) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
            one_hot_BTE, probability_BT1, logits_BTE = (tensor.detach() for tensor in output)
            # The router takes the argmax in the dtype of its input, where rounding can make two experts equal.
            share_BTE = logits_BTE.softmax(-1).to(probability_BT1.dtype)
            experts_BT = share_BTE.argmax(-1).to(torch.int16)
            top = share_BTE.topk(self.top, -1)
            kept_BT, probability_BT = one_hot_BTE.any(-1), probability_BT1[..., 0]
            call = RouterCall(experts_BT, kept_BT, probability_BT, top.indices.to(torch.int16), top.values)
            self._calls[layer].append(call)

        return record

    def take(self) -> list[list[RouterCall]]:
        """Returns the calls recorded since the last `take`, a list for each MoE layer, and forgets them."""
        calls, self._calls = self._calls, [[] for _ in self.layout.layers]
        return calls
