"""Which operators a CUDA build refuses, which make the host wait, and how many kernels they launch.

As in torch 2.13 on sm_90 (H100).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.helpers.cuda_requests import COUNTS, DOWNLOAD, KERNEL, SYNC

SYNCING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique", "_unique2",
    "unique_consecutive", "bincount", "repeat_interleave",
}  # fmt: skip
"""Operators that read a value on the host: the size of their output, or the value itself."""
VIEWS = {
    "view", "_unsafe_view", "expand", "select", "slice", "unsqueeze", "squeeze", "transpose", "t", "permute",
    "as_strided", "detach", "alias", "split", "split_with_sizes", "unbind", "unfold", "_reshape_alias", "lift_fresh",
    "diagonal", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
}  # fmt: skip
"""Operators that launch nothing."""
KERNELS = {"sort": 6, "argsort": 6, "topk": 2}
"""Kernels of an operator that launches several."""
SAME_DEVICE_ALWAYS = {"embedding", "index_select", "gather", "scatter", "index_copy", "index_add", "index_fill"}
"""Operators that refuse even a zero-dimensional index of the other device."""
ANY_DEVICE = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_", "index_put"}
"""Operators with a rule of their own: copies, and indices, which may lie on the host."""
MAX_GROUPS = 1024


def refuse_mixed_devices(name: str, tensors: Sequence[Tensor]) -> None:
    """Raises the error of a CUDA build if an operator's tensors lie on several devices.

    Zero-dimensional tensors on the host are allowed, except as an index.
    """
    if name in ANY_DEVICE:
        return
    strict = name.rstrip("_") in SAME_DEVICE_ALWAYS
    devices = {tensor.device for tensor in tensors if strict or tensor.dim() or tensor.is_cuda}
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {found}! "
            f"(when checking arguments in aten::{name})"
        )


def refuse_foreign_indices(target: Tensor, indices: Sequence[Tensor | None], value: Tensor | None = None) -> None:
    """Raises the errors of indexing by `[]` across devices: an index may lie on the host or beside the target."""
    for index in indices:
        if index is not None and index.is_cuda and index.device != target.device:
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor "
                f"({target.device}), found an index on {index.device}"
            )
    if value is not None and value.dim() and value.device != target.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {target.device} and "
            f"{value.device}! (when checking the value in aten::index_put_)"
        )


def check_grouped_mm(rows: Tensor, weights: Tensor, ends: Any) -> None:
    """Raises `grouped_mm`'s errors for operands that its CUDA kernels refuse, and counts what the call launches.

    Args:
        rows: First operand, data on the host.
        weights: Second operand, data on the host.
        ends: End of each group, on the host; None for two operands with a group dimension.
    """
    for operand in (rows, weights):
        _refuse_strides(operand)
    groups = len(ends) if ends is not None else len(weights)
    if rows.dtype == torch.bfloat16:
        if groups >= MAX_GROUPS:
            raise RuntimeError("Can't process more than 1024 groups")
        COUNTS.add(KERNEL, "_grouped_mm", 2)  # one of them prepares the pointers
        return
    if ends is not None:
        COUNTS.add(SYNC, "offs.cpu() in the fallback of grouped_mm")
        COUNTS.add(DOWNLOAD, "offs.cpu() in the fallback of grouped_mm")
    COUNTS.add(KERNEL, "mm in the fallback of grouped_mm", groups)


def _refuse_strides(operand: Tensor) -> None:
    """Both layouts are allowed, row by row and column by column, with rows at multiples of 16 bytes."""
    step = 16 // operand.element_size()
    (rows, columns), (across, along) = operand.shape[-2:], operand.stride()[-2:]
    if operand.data_ptr() % 16:
        raise RuntimeError("expected data_ptr to be aligned to 16 bytes")
    if across == 1 and along >= max(1, rows):
        outer = along
    elif along == 1 and across >= max(1, columns):
        outer = across
    else:
        raise RuntimeError(f"Invalid strides/sizes, got {operand.stride()} for strides and {operand.shape} for sizes")
    if outer % step:
        raise RuntimeError("strides should be multiple of 16 bytes")
