"""RouterTap: hooks that record the routing decisions of a Hugging Face model.

Of a Switch Transformer it reads what the routers return. Of a decoder-only model it reads what the experts modules are
given: the experts and weights as the router chose them, which logits do not always tell.

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

    Positions are `[B, T]` in a Switch Transformer, and `[B * T, K]` in a decoder-only model, whose experts get all
    tokens in one row and K experts for each.

    Attributes:
        experts: Experts of each position, int16.
        kept: True for positions within their expert's capacity, bool.
        probability: Router probability of that expert; of a decoder-only model the weight that the router gave it.
        top_experts: The likeliest experts, likeliest first, int16 `[B, T, top]` or `[B * T, top]`; none by default.
        top_probability: Router probabilities or weights of these experts, of the same shape.
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
        model: A `SwitchTransformersForConditionalGeneration`, or a decoder-only model with the experts interface.
        layout: The model's MoE layers.
        top: Number of likeliest experts recorded for each token with their probabilities; of a decoder-only model all
            that the router chose, or none.

    Raises:
        ValueError: If `top` is another number.
    """

    def __init__(self, model: nn.Module, layout: MoELayout, top: int = 0) -> None:
        if not 0 <= top <= layout.num_experts:
            raise ValueError(f"top is {top}, expected 0 to {layout.num_experts}, the model's experts")
        if layout.causal and top not in (0, layout.experts_per_token):
            raise ValueError(
                f"top is {top}, expected 0 or {layout.experts_per_token}: the experts that {layout.family} chooses for "
                "each token, whose weights are known"
            )
        self.layout, self.top = layout, top
        self._calls: list[list[RouterCall]] = [[] for _ in layout.layers]
        self._handles: list[Any] = []
        names = (
            layout.modules if layout.causal else [f"{name.removesuffix('experts')}router" for name in layout.modules]
        )
        self._modules = [model.get_submodule(name) for name in names]

    def __enter__(self) -> "RouterTap":
        for layer, module in enumerate(self._modules):
            if self.layout.causal:
                handle = module.register_forward_pre_hook(self._experts_hook(layer), with_kwargs=True)
            else:
                handle = module.register_forward_hook(self._hook(layer))
            self._handles.append(handle)
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

    def _experts_hook(self, layer: int) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
            _, index_NK, weights_NK = (*args, *settings.values())  # hidden states, top_k_index, top_k_weights
            experts_NK, weights_NK = index_NK.detach().to(torch.int16), weights_NK.detach()
            top, kept = slice(0, self.top), torch.ones_like(experts_NK, dtype=torch.bool)
            call = RouterCall(experts_NK, kept, weights_NK, experts_NK[:, top], weights_NK[:, top])
            self._calls[layer].append(call)

        return record

    def take(self) -> list[list[RouterCall]]:
        """Returns the calls recorded since the last `take`, a list for each MoE layer, and forgets them."""
        calls, self._calls = self._calls, [[] for _ in self.layout.layers]
        return calls
