"""SlotExperts: the drop-in for a Switch model's experts module. Same answers, work spread over slots and devices.

In one process the devices are emulated: each one's share of the work runs and is timed in turn.

Shape suffixes: T tokens, M rows, E logical experts, P slots, N places, G devices, D model width.
"""

import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from runtime.plan import EMPTY, IntArray
from runtime.slots import SlotWeights
from runtime.split import device_load, split_by_quota

ALIKE = 16
"""Rows from which on matrix kernels add up a row in the same order whatever their number (seen on CPUs with MKL).

Below it, the part of a split group is filled with empty rows up to what the plain model multiplies at once, and whole
groups keep its order of rows. Without that, last bits differ, and a later router may make much of them.
"""


class SlotExperts(nn.Module):
    """Computes `experts(hidden, one_hot, weights)` over the slots of a plan.

    Set `phy2log` (`[P]`, the layer's row of the plan in force) and `mask` (which rows of `hidden` are real tokens;
    None means all) before a forward. Afterwards `load`, `device_load` and `busy_ms` tell what it did.

    Attributes:
        load: Dispatched tokens of each expert, `[E]`, summed over the calls since `reset`.
        device_load: Tokens each device computed, `[G]`, likewise.
        busy_ms: Milliseconds each device computed, `[G]`, likewise.
    """

    def __init__(self, weights: SlotWeights, activation: nn.Module, phy2log: IntArray, wake_tokens: int = 0) -> None:
        super().__init__()
        self.weights, self.activation, self.phy2log, self.wake_tokens = weights, activation, phy2log, wake_tokens
        self.mask: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Starts counting anew."""
        self.load = np.zeros(int(self.phy2log.max()) + 1, dtype=np.int64)
        self.device_load = np.zeros(self.weights.num_devices, dtype=np.int64)
        self.busy_ms = np.zeros(self.weights.num_devices)

    def forward(self, hidden_TD: Tensor, one_hot_T1E: Tensor, weight_T1: Tensor) -> Tensor:
        """Same contract as `SwitchTransformersExperts`: dropped tokens (all-zero rows) get 0.

        Padding is computed at its expert's home, as the plain model computes it, but it is neither counted nor split.
        """
        token = one_hot_T1E[:, 0].any(-1).nonzero()[:, 0]
        expert, size = one_hot_T1E[token, 0].argmax(-1), one_hot_T1E.shape[-1]
        padding = torch.zeros_like(expert) if self.mask is None else (~self.mask[token]).long()
        counts_EX = torch.bincount(2 * expert + padding, minlength=2 * size).view(size, 2).cpu().numpy()
        quotas = split_by_quota(counts_EX[:, 0], self.phy2log, self.weights.num_devices, wake_tokens=self.wake_tokens)
        output_TD = torch.zeros_like(hidden_TD)
        if len(token):
            place, row, rows_N = self._arrange(quotas[0], counts_EX)
            place_T = torch.empty_like(expert)
            place_T[(2 * expert + padding).argsort(stable=True)] = torch.from_numpy(place).to(token.device)
            token, row_T = token[place_T.argsort(stable=True)], torch.from_numpy(row).to(token.device)
            hidden_MD = hidden_TD.new_zeros(int(rows_N.sum()), hidden_TD.shape[-1])
            hidden_MD[row_T] = hidden_TD[token]
            output_TD[token] = self._compute(hidden_MD, rows_N)[row_T] * weight_T1[token]
        self.load += counts_EX[:, 0]
        self.device_load += device_load(quotas, self.weights.num_devices)
        return output_TD

    def _arrange(self, quota_P: IntArray, counts_EX: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Where tokens go, given the quotas and each expert's real tokens and padding `[E, 2]`.

        Returns:
            The place of each token, tokens sorted by expert with padding last, `[T]`; the row of each token, tokens
            sorted by place, `[T]`; and the rows of each place, `[N]`.
        """
        held_P, home_P = np.where(self.phy2log == EMPTY, 0, self.phy2log), self.weights.is_home_P
        size_P = quota_P + np.where(home_P, counts_EX[held_P, 1], 0)
        by_expert = np.lexsort((home_P, self.phy2log))  # an expert's home comes last, and so does its padding
        place = np.repeat(self.weights.places[by_expert], size_P[by_expert])
        size_N, rows_N = np.zeros((2, len(self.weights.wi_NFD)), dtype=np.int64)
        size_N[self.weights.places] = size_P
        rows_N[self.weights.places] = np.maximum(size_P, np.minimum(counts_EX[held_P].sum(-1), ALIKE)) * (size_P > 0)
        empty_N = (rows_N - size_N).cumsum() - (rows_N - size_N)  # rows filled before each place
        return place, np.arange(len(place)) + np.repeat(empty_N, size_N), rows_N

    def _compute(self, hidden_MD: Tensor, rows_N: IntArray) -> Tensor:
        """Runs each device's rows, which lie next to each other, through its slots."""
        result_MD, start = torch.empty_like(hidden_MD), 0
        for device in range(self.weights.num_devices):
            block = self.weights.block(device)
            offsets = torch.from_numpy(rows_N[block].cumsum()).to(hidden_MD.device, torch.int32)
            stop = start + int(rows_N[block].sum())
            began = self._clock(hidden_MD)
            if stop > start:
                inner = grouped_mm(hidden_MD[start:stop], self.weights.wi_NFD[block].transpose(1, 2), offs=offsets)
                outer = grouped_mm(self.activation(inner), self.weights.wo_NDF[block].transpose(1, 2), offs=offsets)
                result_MD[start:stop] = outer
            self.busy_ms[device] += 1e3 * (self._clock(hidden_MD) - began)
            start = stop
        return result_MD

    @staticmethod
    def _clock(hidden: Tensor) -> float:
        """Seconds; emulated devices are timed one after the other, so the accelerator is waited for."""
        if hidden.is_cuda:
            torch.cuda.synchronize(hidden.device)
        return time.perf_counter()
