"""Routes: which expert computes which token, sorted by expert, from whatever a router returns.

An assignment is one token at one of its K experts: assignment `a` is the choice `a % K` of token `a // K`. Routers
return one of two things, both called `choice` here: a one-hot `[T, 1, E]`, whose row is zero where a token is dropped
(Switch, K is 1), or the experts' numbers `[T, K]` (all other families).

Shape suffixes: B sequences, T tokens, K experts of a token, A = T x K assignments, E experts.
"""

import numpy as np
import torch
from torch import Tensor

from data.arrays import IntArray


def sort_on_device(choice: Tensor, skipped_T: Tensor | None, experts_E: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sorts assignments by expert, then by position; no call in here waits for the device.

    Args:
        choice: What the router returned.
        skipped_T: Whether the token need not be computed; None means that all must.
        experts_E: The numbers 0..E - 1.

    Returns:
        The assignments, int64 `[A]`; those that are dropped or skipped come last. For each expert the number of
        assignments up to its last one, int32 `[E]`: where its group ends. Whether an assignment is left out, `[A]`;
        None if none can be.
    """
    left_out_A: Tensor | None
    if choice.dim() == 3:
        chosen_A, expert_A = choice[:, 0].max(-1)
        left_out_A = chosen_A <= (0 if skipped_T is None else skipped_T)  # 1 <= 0 alone is False: chosen, not skipped
        expert_A.masked_fill_(left_out_A, experts_E.shape[0])
    else:
        expert_A, left_out_A = choice.reshape(-1), None
        if skipped_T is not None:
            left_out_A = skipped_T[:, None].expand(choice.shape).reshape(-1)
            expert_A = expert_A.masked_fill(left_out_A, experts_E.shape[0])
    key_A, assignment_A = expert_A.sort(stable=True)
    return assignment_A, torch.searchsorted(key_A, experts_E, right=True, out_int32=True), left_out_A


def sort_on_host(choice: Tensor, skipped_T: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sorts assignments by expert, then by position, and counts them.

    In numpy, because with few tokens the overhead of the calls dominates, and numpy's is smaller than torch's.

    Args:
        choice: What the router returned, on the CPU.
        skipped_T: Whether the token need not be computed; None means that all must.
        num_experts: E.

    Returns:
        The assignments to compute, int64.
        Counts `[2, E]`, int64: the assignments to compute, and all of the router.
    """
    expert_A = _experts_of(choice, num_experts)
    counts_2E = np.empty((2, num_experts), dtype=np.int64)
    counts_2E[:] = np.bincount(expert_A, minlength=num_experts)[:num_experts]
    if skipped_T is not None:
        per_token = 1 if choice.dim() == 3 else choice.shape[1]
        expert_A = np.where(np.repeat(skipped_T.numpy(), per_token), num_experts, expert_A)
        counts_2E[0] = np.bincount(expert_A, minlength=num_experts)[:num_experts]
    if num_experts < np.iinfo(np.int16).max:
        expert_A = expert_A.astype(np.int16)  # which numpy sorts by radix
    assignment_A = expert_A.argsort(kind="stable")[: int(counts_2E[0].sum())]
    return torch.from_numpy(assignment_A), torch.from_numpy(counts_2E)


def loads_by_sequence(assignment_A: Tensor, ends_E: Tensor, per_sequence: int, sequences: int) -> Tensor:
    """Assignments of each sequence, int64 `[B, E]`; no call in here waits for the device.

    Args:
        assignment_A: Assignments sorted by expert; those beyond the last end are not counted.
        ends_E: Number of assignments up to the last one of each expert.
        per_sequence: Assignments of one sequence, those of its padding counted.
        sequences: B.
    """
    width = len(ends_E) + 1
    place_A = torch.arange(len(assignment_A), dtype=ends_E.dtype, device=ends_E.device)
    expert_A = torch.searchsorted(ends_E, place_A, right=True)
    counts = ends_E.new_zeros(sequences * width, dtype=torch.int64)
    key_A = assignment_A.div(per_sequence, rounding_mode="floor") * width + expert_A
    return counts.scatter_add_(0, key_A, torch.ones_like(key_A)).view(sequences, width)[:, :-1]


def _experts_of(choice: Tensor, num_experts: int) -> IntArray:
    """The expert of each assignment, `[A]`; E where a token is dropped."""
    if choice.dim() == 2:
        return choice.numpy().reshape(-1)
    rows_TE = choice.numpy()[:, 0]
    expert_T = rows_TE.argmax(-1)
    dropped_T = rows_TE[np.arange(len(rows_TE)), expert_T] <= 0
    expert_T[dropped_T] = num_experts
    return np.asarray(expert_T)
