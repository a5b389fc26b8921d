"""TieredExperts: the drop-in for a Switch model's experts module where not all experts fit. Same answers.

Shape suffixes: T tokens, M rows of one expert, E logical experts, D model width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from data.layout import MoELayout
from runtime.cache import ExpertCache


class TieredExperts(nn.Module):
    """Computes `experts(hidden, one_hot, weights)` with experts from a cache: those at hand first, while others load.

    Each expert's rows are multiplied at once and in order, as the plain model does it, so sums come out the same.

    Args:
        cache: Gives the weights.
        layer: Which MoE layer this is.
        activation: Between the two matrices.

    Attributes:
        needed: Which rows are to be computed, bool `[T]`; None means all. Rows left out get 0: that suits padding
            after a sequence's last token, which nothing looks at, and spares the experts that only padding asks for.
    """

    def __init__(self, cache: ExpertCache, layer: int, activation: nn.Module) -> None:
        super().__init__()
        self.cache, self.layer, self.activation = cache, layer, activation
        self.needed: Tensor | None = None

    def forward(self, hidden_TD: Tensor, one_hot_T1E: Tensor, weight_T1: Tensor) -> Tensor:
        """Same contract as `SwitchTransformersExperts`: dropped tokens (all-zero rows) get 0."""
        one_hot_TE = one_hot_T1E[:, 0]
        if self.needed is not None:
            one_hot_TE = one_hot_TE * self.needed[:, None]
        counts: list[int] = one_hot_TE.sum(0).tolist()  # the one wait for the device
        output_TD = torch.zeros_like(hidden_TD)
        if not (kept := sum(counts)):
            return output_TD
        expert_T = torch.where(one_hot_TE.any(-1), one_hot_TE.argmax(-1), len(counts))
        rows_by_expert = torch.split(expert_T.argsort(stable=True)[:kept], counts)
        # the busiest first: what comes last is then soonest done with
        active = sorted((expert for expert, count in enumerate(counts) if count), key=lambda expert: -counts[expert])
        for expert, wi_FD, wo_DF in self.cache.use(self.layer, active):
            row_M = rows_by_expert[expert]
            result_MD = linear(self.activation(linear(hidden_TD[row_M], wi_FD)), wo_DF)
            output_TD[row_M] = (result_MD * weight_T1[row_M]).to(hidden_TD.dtype)
        return output_TD


def install(model: Any, layout: MoELayout, cache: ExpertCache) -> list[TieredExperts]:
    """Puts a `TieredExperts` in the place of each experts module of a model; layers in order."""
    from transformers.activations import ACT2FN

    layers = []
    for layer, name in enumerate(layout.module_names):
        layers.append(TieredExperts(cache, layer, ACT2FN[model.config.dense_act_fn]))
        model.set_submodule(f"{name}.experts", layers[-1])
    return layers


def needed_rows(mask_BT: Tensor) -> Tensor:
    """Which rows come before their sequence's last real token or are it, from the mask of real ones: bool `[B * T]`.

    Padding before the last real token is needed: it takes room in an expert's capacity by what its hidden state is.
    """
    return mask_BT.flip(1).cumsum(1).flip(1).bool().reshape(-1)
