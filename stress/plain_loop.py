"""The plain loop over experts that exactness is measured against, and how far an output is from it.

Shape suffixes: T tokens, K experts of a token, E experts, D model width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.models.expert import ExpertFormat

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-5}
"""Largest difference, relative to the largest output or 1: sums in another order, and some roundings of
bfloat16, each of which is up to 2**-9. Another expert's output differs by about 1."""


def plain_loop(
    hidden_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, computed_T: Tensor, stacks: Sequence[Tensor],
    form: ExpertFormat, between: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """The experts' weighted outputs, `[T, D]`, by a loop over the experts.

    Args:
        hidden_TD: Hidden states.
        expert_TK: Each token's experts; -1 where it is dropped.
        weight_TK: Router weights.
        computed_T: Tokens whose output is wanted; the others get 0.
        stacks: The experts' tensors, each `[E, ...]`; see `ExpertFormat`.
        form: What these tensors are.
        between: What an expert computes between its products.
    """
    dtype = hidden_TD.dtype
    if weight_TK.shape[1] > 1:
        dtype = torch.promote_types(dtype, weight_TK.dtype)
    output_TD = torch.zeros_like(hidden_TD, dtype=dtype)
    for expert in range(len(stacks[0])):
        token, place = torch.where((expert_TK == expert) & computed_T[:, None])
        if len(token):
            first, second, *biases = (stack[expert] for stack in stacks)
            if not form.transposed:
                first, second = first.T, second.T
            inner = hidden_TD[token] @ first
            out = between(inner + biases[0] if biases else inner) @ second
            out = out + biases[1] if biases else out
            output_TD.index_add_(0, token, (out * weight_TK[token, place, None]).to(dtype))
    return output_TD.to(hidden_TD.dtype)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value of `theirs`, or to 1 if that is smaller."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    ours, theirs = ours.double(), theirs.double()
    worst = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))
    return worst if worst == worst else float("inf")
