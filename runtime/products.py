"""What experts compute: two matrix products with an activation between, for the rows of many experts at once.

Shape suffixes: M rows, N places, F inner width, D model width.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from runtime.flight import upload
from runtime.plan import IntArray

ALIKE = 16
"""Rows from which on a CPU's matrix kernels add up a row in the same order whatever their number (seen with MKL).

Below it, a group that was split, or lost padding, is filled up to as many rows as the plain model multiplies at once,
as far as that is known: padding that was not computed may be routed elsewhere later on. Without it, last bits differ
more often, and a later router may make much of them.
"""

GROUPED = range(16, 512)
"""Rows for which one grouped product is faster on a CPU too; fewer do not pay for it, more outgrow the cache."""


def products(
    rows_MD: Tensor, wi_NDF: Tensor, wo_NFD: Tensor, activation: nn.Module, size_N: IntArray, plain_N: IntArray
) -> Tensor:
    """The experts' answers to rows that are sorted by place, `[M, D]`.

    Args:
        rows_MD: Rows.
        wi_NDF: First matrices.
        wo_NFD: Second matrices.
        activation: Between them.
        size_N: Rows of each place; they sum to M.
        plain_N: Rows that the plain model would multiply with the same expert.
    """
    filled = bool(((size_N > 0) & (size_N < np.minimum(plain_N, ALIKE))).any())
    if rows_MD.device.type != "cpu" or (len(rows_MD) in GROUPED and not filled):
        offsets = upload(size_N.cumsum().astype(np.int32), rows_MD.device)
        return grouped_mm(activation(grouped_mm(rows_MD, wi_NDF, offs=offsets)), wo_NFD, offs=offsets)
    result_MD, start = torch.empty_like(rows_MD), 0
    for place in np.flatnonzero(size_N).tolist():
        size = int(size_N[place])
        target = result_MD.narrow(0, start, size)
        product(rows_MD.narrow(0, start, size), wi_NDF[place], wo_NFD[place], activation, int(plain_N[place]), target)
        start += size
    return result_MD


def product(
    rows_MD: Tensor, wi_DF: Tensor, wo_FD: Tensor, activation: nn.Module, plain: int, target_MD: Tensor
) -> None:
    """One expert's answer to its rows, written to `target_MD`; `plain` rows the plain model would multiply with it."""
    size, fill = len(rows_MD), min(plain, ALIKE) - len(rows_MD)
    if fill > 0 and rows_MD.device.type == "cpu":
        rows_MD = torch.cat([rows_MD, rows_MD.new_zeros(fill, rows_MD.shape[1])])
        target_MD.copy_(torch.mm(activation(torch.mm(rows_MD, wi_DF)), wo_FD).narrow(0, 0, size))
    else:
        torch.mm(activation(torch.mm(rows_MD, wi_DF)), wo_FD, out=target_MD)
