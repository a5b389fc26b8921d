"""Grouped GEMM: the two matrix products of an expert, with the activation between them, for the rows of many experts.

Rows are sorted by expert, and so are the buffers that hold the weights:

    size_N                 [2, 0, 3]
    rows_MD                rows 0, 1 go through buffer 0; rows 2, 3, 4 through buffer 2; buffer 1 computes nothing
    offsets (grouped_mm)   [2, 2, 5]

Shape suffixes: M rows, N buffers of one device, F inner width, D model width, P width of the first product: F, or 2 F
with a gate.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from data.arrays import BoolArray, IntArray
from data.models.expert import ExpertFormat
from runtime.distributed.device import Stopwatch, upload
from runtime.distributed.ranks import Ranks

MIN_STABLE_ROWS = 16
"""Minimum number of rows for which MKL's result for one row does not depend on how many rows are multiplied together.

Smaller groups are padded with zero rows to the size the unmodified model would use. This makes bitwise-equal results
frequent; it does not guarantee them, because skipped padding may be routed differently in later layers.
"""

LEAST_GROUPED_ROWS = 8
"""Rows of one call below which a loop over the experts is as fast as `grouped_mm`, whose overhead dominates there."""

MOST_ROWS_EACH = 64
"""Mean rows of an expert above which a loop is as fast on a CPU, whose products are then efficient by themselves."""

PIECE_ROWS = 512
"""Most rows of several experts that a CPU multiplies in one call, so that intermediate results stay in its cache."""

MOST_GROUPS = 1023
"""Groups of one call of CUDA's `grouped_mm`, which refuses 1,024 and more (torch's GroupMM.cu)."""

ALIGNMENT = 16
"""Bytes of which `grouped_mm` wants the strides of a matrix to be multiples."""

FAST_ON_CUDA = (9, 10)
"""Major compute capabilities on which CUDA's `grouped_mm` is one kernel, in bfloat16 only (torch's GroupedBlas.cpp).

Elsewhere it downloads the offsets, which waits for the device, and multiplies every group on its own, empty ones too.
"""

FEW_EXPERTS = 4
"""Most experts that `measure_overhead` gives one row each; with more of them it takes longer than a start should."""

MANY_ROWS = 64
"""Rows that `measure_overhead` gives to one expert."""


@dataclass(frozen=True)
class ExpertFunction:
    """What an expert computes.

    Attributes:
        format: Its tensors.
        between: Applied between the two products: an activation, or a gate, which halves the width.
    """

    format: ExpertFormat
    between: Callable[[Tensor], Tensor]

    def ready(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors as they are multiplied with: matrices as `[..., in, out]`."""
        matrices = tensors[:2] if self.format.transposed else [each.transpose(-2, -1) for each in tensors[:2]]
        return [*matrices, *tensors[2:]]


class GroupedExperts:
    """The experts in the buffers of one device, computed together.

    Args:
        tensors: The experts' tensors as they are stored, each with one row for each buffer; see `ExpertFormat`.
        function: What they compute.

    Attributes:
        wi_NDP: First matrices as they are multiplied with.
        wo_NFD: Second matrices as they are multiplied with.
    """

    def __init__(self, tensors: Sequence[Tensor], function: ExpertFunction) -> None:
        self._ready, self._between = function.ready(tensors), function.between
        self.wi_NDP, self.wo_NFD = self._ready[:2]
        self._each = list(zip(*(tensor.unbind() for tensor in self._ready), strict=True))
        sides = [side for matrix in self._ready[:2] for side in matrix.shape[1:]]
        aligned = all(side * tensors[0].itemsize % ALIGNMENT == 0 for side in sides)
        self.fast = aligned and _is_fast(tensors[0])

    @property
    def needs_no_sizes(self) -> bool:
        """Whether `compute_groups` alone does for any rows, so that the host need not know how many there are."""
        return self.fast and len(self._each) <= MOST_GROUPS

    def compute(self, rows_MD: Tensor, size_N: IntArray, reference_N: IntArray, ends_N: Tensor | None) -> Tensor:
        """Outputs of the experts for rows sorted by buffer, `[M, D]`.

        Args:
            rows_MD: Rows.
            size_N: Rows of each buffer; they sum to M.
            reference_N: Rows that the unmodified model would multiply with the same expert.
            ends_N: Row at which each buffer's rows end, int32 on the device; None uploads them if they are needed.
        """
        if rows_MD.is_cpu:
            if rows_MD.shape[0] <= PIECE_ROWS or np.count_nonzero(size_N) == 1:
                return self._piece(rows_MD, size_N, reference_N)
            output_MD = torch.empty_like(rows_MD)
            for first, part_N in pieces_of(size_N, PIECE_ROWS):
                rows = int(part_N.sum())
                part_MD = self._piece(rows_MD.narrow(0, first, rows), part_N, reference_N)
                output_MD.narrow(0, first, rows).copy_(part_MD)
            return output_MD
        if not self.fast:
            return self._one_by_one(rows_MD, size_N, reference_N)
        if ends_N is None:
            ends_N = upload(ends_of(size_N), rows_MD.device)
        return self.compute_groups(rows_MD, ends_N) if self.needs_no_sizes else self._in_pieces(rows_MD, size_N, ends_N)

    def _piece(self, rows_MD: Tensor, size_N: IntArray, reference_N: IntArray) -> Tensor:
        """Outputs on a CPU, grouped where that is faster and keeps results stable."""
        rows, active = rows_MD.shape[0], np.count_nonzero(size_N)
        few = LEAST_GROUPED_ROWS <= rows <= MOST_ROWS_EACH * active
        if self.fast and few and active > 1 and not _needs_padding(size_N, reference_N).any():
            return self.compute_groups(rows_MD, torch.from_numpy(ends_of(size_N)))
        return self._one_by_one(rows_MD, size_N, reference_N)

    def _one_by_one(self, rows_MD: Tensor, size_N: IntArray, reference_N: IntArray) -> Tensor:
        """Outputs by a loop over the experts."""
        output_MD, start = torch.empty_like(rows_MD), 0
        for buffer in size_N.nonzero()[0].tolist():
            size = int(size_N[buffer])
            part_MD, out_MD = rows_MD.narrow(0, start, size), output_MD.narrow(0, start, size)
            compute_expert(part_MD, self._each[buffer], self._between, int(reference_N[buffer]), out_MD)
            start += size
        return output_MD

    def compute_groups(self, rows_MD: Tensor, ends_N: Tensor) -> Tensor:
        """Outputs for rows sorted by buffer, `[M, D]`; rows beyond the last end get no particular value."""
        return self._products(rows_MD, ends_N, self._ready)

    def _products(self, rows_MD: Tensor, ends_N: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Both products for the rows of some buffers, given the tensors in these buffers."""
        wi_NDP, wo_NFD, *biases = weights
        if not biases:
            return grouped_mm(self._between(grouped_mm(rows_MD, wi_NDP, offs=ends_N)), wo_NFD, offs=ends_N)
        row_M = torch.arange(rows_MD.shape[0], dtype=ends_N.dtype, device=rows_MD.device)
        buffer_M = torch.searchsorted(ends_N, row_M, right=True, out_int32=True).clamp_(max=ends_N.shape[0] - 1)
        first_MP, second_MD = (bias.index_select(0, buffer_M) for bias in biases)
        inner_MF = self._between(grouped_mm(rows_MD, wi_NDP, offs=ends_N).add_(first_MP))
        return grouped_mm(inner_MF, wo_NFD, offs=ends_N).add_(second_MD)

    def _in_pieces(self, rows_MD: Tensor, size_N: IntArray, ends_N: Tensor) -> Tensor:
        """As `compute_groups`, with fewer groups a call than CUDA's limit."""
        outputs_MD, start = [], 0
        for first in range(0, len(size_N), MOST_GROUPS):
            buffers = slice(first, first + MOST_GROUPS)
            part_MD = rows_MD.narrow(0, start, int(size_N[buffers].sum()))
            weights = [tensor[buffers] for tensor in self._ready]
            outputs_MD.append(self._products(part_MD, ends_N[buffers] - start, weights))
            start += part_MD.shape[0]
        return torch.cat(outputs_MD)


def pieces_of(size_N: IntArray, most: int) -> Iterator[tuple[int, IntArray]]:
    """Consecutive groups with at most so many rows in all: their first row, and the sizes with those of others at 0.

    A group with more rows is a piece of its own. Sizes [2, 0, 3, 9] give, with at most 5, (0, [2, 0, 3, 0]) and
    (5, [0, 0, 0, 9]).
    """
    first, start, ends_N = 0, 0, size_N.cumsum()
    while start < ends_N[-1]:
        whole, alone = np.searchsorted(ends_N, [start + most, start], side="right")
        stop = max(int(whole), int(alone) + 1)
        part_N = np.zeros_like(size_N)
        part_N[first:stop] = size_N[first:stop]
        yield start, part_N
        first, start = stop, int(ends_N[stop - 1])


def ends_of(size_N: IntArray) -> IntArray:
    """Row at which each group ends, int32: sizes [2, 0, 3] give [2, 2, 5]. The last axis counts groups."""
    return size_N.cumsum(-1, dtype=np.int32)


def _is_fast(weight: Tensor) -> bool:
    """Whether `grouped_mm` is one kernel for weights like this one; on a CPU it is a loop inside one call."""
    if weight.device.type != "cuda":
        return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    capability: tuple[int, int] = torch.cuda.get_device_capability(weight.device)
    return weight.dtype == torch.bfloat16 and capability[0] in FAST_ON_CUDA


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
        buffer_N = np.arange(experts.wi_NDP.shape[0])
        read = min(len(buffer_N), FEW_EXPERTS)
        one_row = _least_ms(experts, np.where(buffer_N < read, 1, 0), repeats) / read
        token = _least_ms(experts, np.where(buffer_N < 1, MANY_ROWS, 0), repeats) / MANY_ROWS
        overhead[0] = min(max(round(one_row / token) - 1, 0), MANY_ROWS - 1)
    with ranks.watched():
        return int(ranks.broadcast(overhead)[0])


def _least_ms(experts: GroupedExperts, size_N: IntArray, repeats: int) -> float:
    """Shortest of several times of one call, for experts to which the unmodified model sends many rows."""
    rows_MD = experts.wi_NDP.new_ones((int(size_N.sum()), experts.wi_NDP.shape[1]))
    stopwatch, times = Stopwatch(rows_MD.device), []
    for _ in range(repeats):
        with stopwatch:
            experts.compute(rows_MD, size_N, np.minimum(size_N * MANY_ROWS, MANY_ROWS), None)
        times.append(stopwatch.take_ms())
    return min(times)


def _needs_padding(size_N: IntArray, reference_N: IntArray) -> BoolArray:
    """Buffers whose rows must be padded to keep results stable, `[N]`."""
    return (size_N > 0) & (size_N < np.minimum(reference_N, MIN_STABLE_ROWS))


def compute_expert(
    rows_MD: Tensor,
    weights: Sequence[Tensor],
    between: Callable[[Tensor], Tensor],
    reference_rows: int,
    out_MD: Tensor,
) -> None:
    """Computes the output of one expert.

    Args:
        rows_MD: Its rows.
        weights: Its tensors as they are multiplied with; see `ExpertFunction.ready`.
        between: Applied between the two products.
        reference_rows: Rows that the unmodified model would multiply with it.
        out_MD: Where the output is written.
    """
    size = rows_MD.shape[0]
    if (padding := min(reference_rows, MIN_STABLE_ROWS) - size) > 0 and rows_MD.is_cpu:
        rows_MD = torch.cat([rows_MD, rows_MD.new_zeros(padding, rows_MD.shape[1])])
        out_MD.copy_(_two_products(rows_MD, weights, between, None).narrow(0, 0, size))
    else:
        _two_products(rows_MD, weights, between, out_MD)


def _two_products(
    rows_MD: Tensor, weights: Sequence[Tensor], between: Callable[[Tensor], Tensor], out_MD: Tensor | None
) -> Tensor:
    wi_DP, wo_FD, *biases = weights
    if not biases:
        return torch.mm(between(torch.mm(rows_MD, wi_DP)), wo_FD, out=out_MD)
    return torch.addmm(biases[1], between(torch.addmm(biases[0], rows_MD, wi_DP)), wo_FD, out=out_MD)
