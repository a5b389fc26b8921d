"""Choices: what a layer's router chose, as tokens in the order of their experts and as counts.

Shape suffixes: T tokens of this rank, E logical experts.
"""

import numpy as np
import torch
from torch import Tensor


def choices(one_hot_TE: Tensor, needed_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sorts tokens by the expert that computes them.

    Args:
        one_hot_TE: A one in the column of the expert; none where a token was dropped.
        needed_T: Which tokens must be computed; None means all.

    Returns:
        Tokens sorted by expert and then by position, int64; those that are left out come last, or not at all.
        Counts of the tokens that are computed and of all that were routed, int64 `[2, E]`, on the same device.
    """
    return (_on_host if one_hot_TE.is_cpu else _on_device)(one_hot_TE, needed_T)


def _on_device(one_hot_TE: Tensor, needed_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Nothing here waits for the device."""
    needed_TE = one_hot_TE if needed_T is None else one_hot_TE * needed_T.unsqueeze(1)
    expert_T = torch.where(needed_TE.any(-1), needed_TE.argmax(-1), one_hot_TE.shape[-1])
    return expert_T.argsort(stable=True), torch.stack([needed_TE.sum(0), one_hot_TE.sum(0)])


def _on_host(one_hot_TE: Tensor, needed_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """With few tokens calls are what takes time, and numpy's are the shorter ones."""
    rows_TE = one_hot_TE.numpy()
    tokens, experts = rows_TE.shape
    expert_T = rows_TE.argmax(-1)
    routed_T = rows_TE[np.arange(tokens), expert_T] > 0
    token = (routed_T if needed_T is None else routed_T & needed_T.numpy()).nonzero()[0]
    expert = expert_T[token]
    counts_2E = np.empty((2, experts), dtype=np.int64)
    counts_2E[:] = np.bincount(expert, minlength=experts)
    if needed_T is not None:
        counts_2E[1] = np.bincount(expert_T[routed_T], minlength=experts)
    return torch.from_numpy(token[expert.argsort(kind="stable")]), torch.from_numpy(counts_2E)
