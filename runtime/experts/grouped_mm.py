"""What experts compute: two matrix products with an activation between, for the rows of many experts at once.

Shape suffixes: M rows, N places, F inner width, D model width.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from data.arrays import IntArray
from runtime.experts.dispatch import upload

MIN_STABLE_ROWS = 16
"""Rows from which on a CPU's matrix kernels add up a row in the same order whatever their number (seen with MKL).

Below it, a group that was split, or lost padding, is filled up to as many rows as the plain model multiplies at once,
as far as that is known: padding that was not computed may be routed elsewhere later on. Without it, last bits differ
more often, and a later router may make much of them.
"""

GROUPED_MM_ROWS = range(16, 512)
"""Rows for which one grouped product is faster on a CPU too; fewer do not pay for it, more outgrow the cache."""


class Block:
    """The experts in the places of one device, that compute together.

    Args:
        wi_NFD: First matrices as they are stored.
        wo_NDF: Second matrices likewise.
        activation: Between them.

    Attributes:
        wi_NDF: First matrices as they are multiplied with.
        wo_NFD: Second matrices likewise.
    """

    def __init__(self, wi_NFD: Tensor, wo_NDF: Tensor, activation: nn.Module) -> None:
        self.wi_NDF, self.wo_NFD, self._activation = wi_NFD.transpose(1, 2), wo_NDF.transpose(1, 2), activation
        self._each = list(zip(self.wi_NDF.unbind(), self.wo_NFD.unbind(), strict=True))

    def answer(self, rows_MD: Tensor, size_N: IntArray, plain_N: IntArray) -> Tensor:
        """The experts' answers to rows that are sorted by place, `[M, D]`.

        Args:
            rows_MD: Rows.
            size_N: Rows of each place; they sum to M.
            plain_N: Rows that the plain model would multiply with the same expert.
        """
        rows = rows_MD.shape[0]
        if not rows_MD.is_cpu or (rows in GROUPED_MM_ROWS and not _short(size_N, plain_N).any()):
            offsets = upload(size_N.cumsum().astype(np.int32), rows_MD.device)
            inner_MF = self._activation(grouped_mm(rows_MD, self.wi_NDF, offs=offsets))
            return grouped_mm(inner_MF, self.wo_NFD, offs=offsets)
        result_MD, start = torch.empty_like(rows_MD), 0
        for place in size_N.nonzero()[0].tolist():
            size = int(size_N[place])
            part_MD, target_MD = rows_MD.narrow(0, start, size), result_MD.narrow(0, start, size)
            product(part_MD, *self._each[place], self._activation, int(plain_N[place]), target_MD)
            start += size
        return result_MD


def _short(size_N: IntArray, plain_N: IntArray) -> npt.NDArray[np.bool_]:
    """Places whose rows are filled up, `[N]`."""
    return (size_N > 0) & (size_N < np.minimum(plain_N, MIN_STABLE_ROWS))


def product(
    rows_MD: Tensor, wi_DF: Tensor, wo_FD: Tensor, activation: nn.Module, plain: int, target_MD: Tensor
) -> None:
    """One expert's answer to its rows, written to `target_MD`; `plain` rows the plain model would multiply with it."""
    size = rows_MD.shape[0]
    if (fill := min(plain, MIN_STABLE_ROWS) - size) > 0 and rows_MD.is_cpu:
        rows_MD = torch.cat([rows_MD, rows_MD.new_zeros(fill, rows_MD.shape[1])])
        target_MD.copy_(torch.mm(activation(torch.mm(rows_MD, wi_DF)), wo_FD).narrow(0, 0, size))
    else:
        torch.mm(activation(torch.mm(rows_MD, wi_DF)), wo_FD, out=target_MD)
