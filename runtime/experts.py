"""SlotExperts: the drop-in for a Switch model's experts module. Same answers, work spread over slots and devices.

In one process the devices are emulated: each one's share of the work runs and is timed in turn.

Shape suffixes: T tokens, E logical experts, P slots, N places, G devices, D model width.
"""

import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from runtime.plan import IntArray
from runtime.slots import SlotWeights
from runtime.split import device_load, split_by_quota


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
        """Same contract as `SwitchTransformersExperts`: dropped tokens (all-zero rows) and padding get 0."""
        kept_T = one_hot_T1E[:, 0].any(-1)
        if self.mask is not None:
            kept_T &= self.mask
        token = kept_T.nonzero()[:, 0]
        expert, order = one_hot_T1E[token, 0].argmax(-1).sort(stable=True)
        counts = torch.bincount(expert, minlength=one_hot_T1E.shape[-1]).cpu().numpy()
        quotas = split_by_quota(counts, self.phy2log, self.weights.num_devices, wake_tokens=self.wake_tokens)
        place, by_place = self._places(quotas[0]).to(hidden_TD.device).sort(stable=True)
        token = token[order][by_place]
        output_TD = torch.zeros_like(hidden_TD)
        if len(token):
            output_TD[token] = self._compute(hidden_TD[token], place, quotas[0]) * weight_T1[token]
        self.load += counts
        self.device_load += device_load(quotas, self.weights.num_devices)
        return output_TD

    def _places(self, quota_P: IntArray) -> Tensor:
        """The place of each token, the tokens sorted by expert: an expert's first tokens go to its first slot."""
        slots = np.argsort(self.phy2log, kind="stable")  # empty slots come first and have no quota
        return torch.from_numpy(np.repeat(self.weights.places[slots], quota_P[slots]))

    def _compute(self, hidden_TD: Tensor, place_T: Tensor, quota_P: IntArray) -> Tensor:
        """Runs each device's tokens, which lie next to each other, through its slots."""
        counts_N = np.zeros(len(self.weights.wi_NFD), dtype=np.int64)
        counts_N[self.weights.places] = quota_P
        results, start = [], 0
        for device in range(self.weights.num_devices):
            block = self.weights.block(device)
            offsets = torch.from_numpy(counts_N[block].cumsum()).to(hidden_TD.device, torch.int32)
            stop = start + int(counts_N[block].sum())
            began = time.perf_counter()
            if stop > start:
                inner = grouped_mm(hidden_TD[start:stop], self.weights.wi_NFD[block].transpose(1, 2), offs=offsets)
                results.append(
                    grouped_mm(self.activation(inner), self.weights.wo_NDF[block].transpose(1, 2), offs=offsets)
                )
            self.busy_ms[device] += 1e3 * (time.perf_counter() - began)
            start = stop
        return torch.cat(results)
