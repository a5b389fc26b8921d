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
from runtime.distributed.device import Stopwatch, upload
from runtime.distributed.ranks import Ranks

MIN_STABLE_ROWS = 16
"""Minimum number of rows for which MKL's result for one row does not depend on how many rows are multiplied together.

Smaller groups are padded with zero rows to the size the unmodified model would use. This makes bitwise-equal results
frequent; it does not guarantee them, because skipped padding may be routed differently in later layers.
"""

GROUPED_MM_ROWS = range(16, 512)
"""Rows of one call for which `grouped_mm` is faster than a loop over the experts on a CPU.

With fewer rows its overhead dominates; with more, its intermediate results no longer fit into the cache.
"""

FEW_EXPERTS = 4
"""Most experts that `measure_overhead` gives one row each; with more of them it takes longer than a start should."""

MANY_ROWS = 64
"""Rows that `measure_overhead` gives to one expert."""


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


@torch.no_grad()
def measure_overhead(experts: GroupedExperts, ranks: Ranks, repeats: int = 2) -> int:
    """Tokens a device computes in the time it takes to read one more expert's weights: 0 to 63, measured.

    Rank 0 measures and every rank gets its figure, because all ranks must split alike.

    Compares one row through each of four experts with 64 rows through one expert. If one row takes 3 ms and 64 rows
    take 6.4 ms, which is 0.1 ms per token, one more expert costs 3 / 0.1 - 1 = 29 tokens. On a CPU the single row is
    padded to `MIN_STABLE_ROWS`, as in a replica of a hot expert; the padding is part of the cost.

    Args:
        experts: The experts of one device; the time does not depend on the weights' values.
        ranks: The ranks, all of which call this.
        repeats: Measurements of each time, of which the shortest counts.
    """
    overhead = np.zeros(1, dtype=np.int64)
    if ranks.rank == 0:
        buffer_N = np.arange(experts.wi_NDF.shape[0])
        read = min(len(buffer_N), FEW_EXPERTS)
        one_row = _least_ms(experts, np.where(buffer_N < read, 1, 0), repeats) / read
        token = _least_ms(experts, np.where(buffer_N < 1, MANY_ROWS, 0), repeats) / MANY_ROWS
        overhead[0] = min(max(round(one_row / token) - 1, 0), MANY_ROWS - 1)
    with ranks.watched():
        return int(ranks.broadcast(overhead)[0])


def _least_ms(experts: GroupedExperts, size_N: IntArray, repeats: int) -> float:
    """Shortest of several times of one call, for experts to which the unmodified model sends many rows."""
    rows_MD = experts.wi_NDF.new_ones((int(size_N.sum()), experts.wi_NDF.shape[1]))
    stopwatch, times = Stopwatch(rows_MD.device), []
    for _ in range(repeats):
        with stopwatch:
            experts.compute(rows_MD, size_N, np.minimum(size_N * MANY_ROWS, MANY_ROWS))
        times.append(stopwatch.take_ms())
    return min(times)


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
