"""Grouped GEMM: the two matrix products of an expert, with the activation between them, for the rows of many experts.

Rows are sorted by expert, and so are the buffers that hold the weights:

    size_N                 [2, 0, 3]
    rows_MD                rows 0, 1 go through buffer 0; rows 2, 3, 4 through buffer 2; buffer 1 computes nothing
    offsets (grouped_mm)   [2, 2, 5]

Shape suffixes: M rows, N buffers of one device, F inner width, D model width.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from data.arrays import BoolArray, IntArray
from runtime.distributed.device import upload

MIN_STABLE_ROWS = 16
"""Minimum number of rows for which MKL's result for one row does not depend on how many rows are multiplied together.

Smaller groups are padded with zero rows to the size the unmodified model would use. This makes bitwise-equal results
frequent; it does not guarantee them, because skipped padding may be routed differently in later layers.
"""

GROUPED_MM_ROWS = range(16, 512)
"""Rows of one call for which `grouped_mm` is faster than a loop over the experts on a CPU.

With fewer rows its overhead dominates; with more, its intermediate results no longer fit into the cache.
"""


class GroupedExperts:
    """The experts in the buffers of one device, computed together.

    Args:
        wi_NFD: First matrices as they are stored.
        wo_NDF: Second matrices as they are stored.
        activation: Applied between the two products.

    Attributes:
        wi_NDF: First matrices as they are multiplied with.
        wo_NFD: Second matrices as they are multiplied with.
    """

    def __init__(self, wi_NFD: Tensor, wo_NDF: Tensor, activation: nn.Module) -> None:
        self.wi_NDF, self.wo_NFD, self._activation = wi_NFD.transpose(1, 2), wo_NDF.transpose(1, 2), activation
        self._each = list(zip(self.wi_NDF.unbind(), self.wo_NFD.unbind(), strict=True))

    def compute(self, rows_MD: Tensor, size_N: IntArray, reference_N: IntArray) -> Tensor:
        """Outputs of the experts for rows sorted by buffer, `[M, D]`.

        Args:
            rows_MD: Rows.
            size_N: Rows of each buffer; they sum to M.
            reference_N: Rows that the unmodified model would multiply with the same expert.
        """
        rows = rows_MD.shape[0]
        if not rows_MD.is_cpu or (rows in GROUPED_MM_ROWS and not _needs_padding(size_N, reference_N).any()):
            offsets = upload(size_N.cumsum().astype(np.int32), rows_MD.device)
            inner_MF = self._activation(grouped_mm(rows_MD, self.wi_NDF, offs=offsets))
            return grouped_mm(inner_MF, self.wo_NFD, offs=offsets)
        output_MD, start = torch.empty_like(rows_MD), 0
        for buffer in size_N.nonzero()[0].tolist():
            size = int(size_N[buffer])
            part_MD, out_MD = rows_MD.narrow(0, start, size), output_MD.narrow(0, start, size)
            compute_expert(part_MD, *self._each[buffer], self._activation, int(reference_N[buffer]), out_MD)
            start += size
        return output_MD


def _needs_padding(size_N: IntArray, reference_N: IntArray) -> BoolArray:
    """Buffers whose rows must be padded to keep results stable, `[N]`."""
    return (size_N > 0) & (size_N < np.minimum(reference_N, MIN_STABLE_ROWS))


def compute_expert(
    rows_MD: Tensor, wi_DF: Tensor, wo_FD: Tensor, activation: nn.Module, reference_rows: int, out_MD: Tensor
) -> None:
    """Writes one expert's output to `out_MD`; the unmodified model would multiply `reference_rows` rows with it."""
    size = rows_MD.shape[0]
    if (padding := min(reference_rows, MIN_STABLE_ROWS) - size) > 0 and rows_MD.is_cpu:
        rows_MD = torch.cat([rows_MD, rows_MD.new_zeros(padding, rows_MD.shape[1])])
        out_MD.copy_(torch.mm(activation(torch.mm(rows_MD, wi_DF)), wo_FD).narrow(0, 0, size))
    else:
        torch.mm(activation(torch.mm(rows_MD, wi_DF)), wo_FD, out=out_MD)
