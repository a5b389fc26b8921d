"""LayerCounters: what one MoE layer computed since its counters were reset.

Shape suffixes: B sequences, E logical experts, G devices.
"""

import numpy as np
import torch
from torch import Tensor

from data.arrays import IntArray
from runtime.distributed.device import Download

FOLD_STEPS = 64
"""Counts of a device that are kept before they are added up."""


class LayerCounters:
    """Counts of tokens; those that only the device knows are downloaded, and awaited when somebody looks.

    Args:
        num_experts: E.
        num_devices: G.

    Attributes:
        sent: Tokens sent from one rank to another.
    """

    def __init__(self, num_experts: int, num_devices: int) -> None:
        self.sent = 0
        self._load_E = np.zeros(num_experts, dtype=np.int64)
        self._device_load_G = np.zeros(num_devices, dtype=np.int64)
        self._ends: list[Tensor] = []
        self._download: Download | None = None
        self._sequences: Download | None = None

    @property
    def load(self) -> IntArray:
        """Tokens of each expert computed on any rank, `[E]`."""
        self._settle()
        return self._load_E

    @property
    def device_load(self) -> IntArray:
        """Tokens each device computed, `[G]`."""
        self._settle()
        return self._device_load_G

    @property
    def sequence_load(self) -> IntArray | None:
        """Tokens of each sequence and expert, `[B, E]`; None if they were not counted."""
        return None if self._sequences is None else self._sequences.numpy()

    def set_sequences(self, load_BE: Tensor) -> None:
        """Starts to download the loads of the sequences of the batch, which a layer counts in one go."""
        self._sequences = Download(load_BE)

    def add_ends(self, ends_E: Tensor) -> None:
        """Counts a step of the only device, from the rows at which each expert's tokens end on it."""
        self._ends.append(ends_E)
        if len(self._ends) == FOLD_STEPS:
            self._fold()

    def download(self) -> None:
        """Starts to download what the device has counted."""
        if self._ends:
            self._fold()
            self._download = Download(self._ends[0])

    def _fold(self) -> None:
        """Adds up several steps: sums of rows at which groups end are the ends of the groups' sums."""
        if len(self._ends) > 1:
            self._ends = [torch.stack(self._ends).sum(0)]

    def _settle(self) -> None:
        """Adds what the device has counted; waits for it."""
        if not self._ends:
            return
        if self._download is None:
            self.download()
        assert self._download is not None
        ends_E = self._download.numpy().astype(np.int64)
        self._load_E[0] += ends_E[0]
        self._load_E[1:] += ends_E[1:] - ends_E[:-1]
        self._device_load_G[0] = self._load_E.sum()
        self._ends, self._download = [], None
