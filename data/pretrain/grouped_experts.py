"""GroupedExperts: a faster training forward that computes all experts of a layer with two grouped matrix products.

Shape suffixes: T tokens, E experts, D width of the model, F inner width of an expert.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersDenseActDense,
    SwitchTransformersSparseMLP,
)


class GroupedExperts(nn.Module):
    """Replaces `SwitchTransformersExperts` (ReLU, no dropout): weights are stacked, tokens sorted by expert."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.wi_EDF = nn.Parameter(torch.stack([expert.wi.weight.detach().T for expert in _members(experts)]))
        self.wo_EFD = nn.Parameter(torch.stack([expert.wo.weight.detach().T for expert in _members(experts)]))

    def forward(self, hidden_TD: Tensor, one_hot_T1E: Tensor, weight_T1: Tensor) -> Tensor:
        """Computes the same output as the replaced module; dropped tokens (all-zero rows of `one_hot`) get 0.

        With experts [1, dropped, 0, 1], the tokens kept are [0, 2, 3], their order by expert is [2, 0, 3], and the
        offsets (end of each expert's rows) are [1, 3].
        """
        offsets = one_hot_T1E.sum((0, 1)).cumsum(0).int()
        kept = one_hot_T1E.sum((1, 2)).nonzero()[:, 0]
        order = kept[one_hot_T1E[kept, 0].argmax(-1).argsort(stable=True)]
        inner = grouped_mm(hidden_TD[order], self.wi_EDF, offs=offsets).relu()
        outer = grouped_mm(inner, self.wo_EFD, offs=offsets) * weight_T1[order]
        return torch.zeros_like(hidden_TD).index_add(0, order, outer)

    def write_back(self, experts: nn.Module) -> None:
        """Copies the trained weights to the replaced module."""
        with torch.no_grad():
            for expert, wi, wo in zip(_members(experts), self.wi_EDF, self.wo_EFD, strict=True):
                expert.wi.weight.copy_(wi.T)
                expert.wo.weight.copy_(wo.T)


def _members(experts: nn.Module) -> list[SwitchTransformersDenseActDense]:
    return [expert for expert in experts.children() if isinstance(expert, SwitchTransformersDenseActDense)]


def group_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Replaces the experts of every MoE layer by `GroupedExperts`; returns the originals by module name."""
    layers = [name for name, module in model.named_modules() if isinstance(module, SwitchTransformersSparseMLP)]
    originals = {f"{name}.experts": model.get_submodule(f"{name}.experts") for name in layers}
    for name, experts in originals.items():
        model.set_submodule(name, GroupedExperts(experts))
    return originals


def ungroup_experts(model: nn.Module, originals: dict[str, nn.Module]) -> None:
    """Puts the original modules back, with the trained weights."""
    for name, experts in originals.items():
        grouped = model.get_submodule(name)
        assert isinstance(grouped, GroupedExperts)
        grouped.write_back(experts)
        model.set_submodule(name, experts)
