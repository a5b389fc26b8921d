"""Links: how long tokens take to the GPUs and back, and experts to their new slots, from measured times of NCCL.

Within a node of 8 GPUs times were measured. Between nodes they follow from nominal speeds, and `measured` is False.
"""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from data.arrays import FloatArray
from runtime.gpu.devices import GPUS_A_NODE, GpuDevice
from runtime.gpu.tables import column, dispatch_rows, link_rows

BYTES = 2
"""Bytes of a number of a hidden state."""


class Links:
    """Times of one group of GPUs.

    Args:
        device: The GPU.
        devices: GPUs of the group.
        folder: Folder of the whole tables; None for the excerpt.
    """

    def __init__(self, device: GpuDevice, devices: int, folder: Path | None = None) -> None:
        self.device, self.devices, self.folder = device, devices, folder
        self.rows = link_rows(device.name, folder)
        sizes = sorted(set(self.rows["num_gpus"].to_pylist()))
        self.size = next((size for size in sizes if size >= devices), None)
        self.source = str(self.rows["source"][0])

    @property
    def measured(self) -> bool:
        """Whether the group is in one node, so that its times were measured."""
        return self.size is not None

    @property
    def dispatch_source(self) -> str:
        """Where the times of all-to-all dispatch and combine come from."""
        return str(dispatch_rows(self.device.name, self.folder)["source"][0])

    def exchange_milliseconds(self, tokens: FloatArray, hidden_size: int) -> FloatArray:
        """Time in which all tokens reach all GPUs, and their results are added up: the same for every placement."""
        nbytes = tokens * hidden_size * BYTES
        if self.devices == 1:
            return np.zeros_like(nbytes)
        if not self.measured:
            return 2 * 1e3 * nbytes * (1 - GPUS_A_NODE / self.devices) / self.device.network_speed
        return self._along("all_gather", nbytes) + self._along("reduce_scatter", nbytes)

    def dispatch_milliseconds(self, tokens: FloatArray, hidden_size: int, top_k: int) -> FloatArray:
        """Time of an all-to-all dispatch and combine, measured with DeepEP on 8 GPUs; smaller groups need no longer.

        Args:
            tokens: Assignments of the most loaded GPU over `top_k`: the tokens of each GPU, if all were as loaded.
            hidden_size: Width of the hidden states.
            top_k: Experts of a token.
        """
        if self.devices == 1:
            return np.zeros_like(tokens)
        if not self.measured:
            nbytes = tokens * top_k * hidden_size * BYTES
            return 2 * 1e3 * nbytes * (1 - GPUS_A_NODE / self.devices) / self.device.network_speed
        rows = dispatch_rows(self.device.name, self.folder)
        chosen = pc.and_(pc.equal(rows["hidden_size"], hidden_size), pc.equal(rows["top_k"], top_k))
        rows = rows.filter(chosen).sort_by("tokens")
        known, time = np.log(column(rows, "tokens")), np.log(column(rows, "milliseconds"))
        return np.asarray(np.exp(np.interp(np.log(np.maximum(tokens, 1.0)), known, time)))

    def move_milliseconds(self, nbytes: FloatArray) -> FloatArray:
        """Time in which the GPU that receives most gets so many bytes of weights."""
        if self.devices == 1:
            return np.zeros_like(nbytes)
        if self.size is None:
            return 1e3 * nbytes / self.device.network_speed
        return self._along("alltoall", nbytes * self.size / (self.size - 1))  # a part of it stays where it is

    def _along(self, operation: str, nbytes: FloatArray) -> FloatArray:
        """Interpolated on logarithmic axes; larger messages go in pieces of the largest that was measured."""
        chosen = pc.and_(pc.equal(self.rows["operation"], operation), pc.equal(self.rows["num_gpus"], self.size))
        rows = self.rows.filter(chosen).sort_by("bytes")
        size, time = column(rows, "bytes"), column(rows, "milliseconds")
        pieces = np.maximum(np.ceil(nbytes / size[-1]), 1)
        each = np.exp(np.interp(np.log(np.maximum(nbytes / pieces, size[0])), np.log(size), np.log(time)))
        return np.where(nbytes > 0, pieces * each, 0.0)
