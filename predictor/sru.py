"""Simple Recurrent Units in plain torch: one matrix product for all steps, then a cheap elementwise recurrence.

Source of the method: Lei, Zhang, Wang, Dai and Artzi, "Simple Recurrent Units for Highly Parallelizable Recurrence"
(EMNLP 2018), equations 3 to 7. Shape suffixes: B sequences, T positions, H hidden width.
"""

import math

import torch
from torch import Tensor, nn


class SRULayer(nn.Module):
    """One layer; input and output have the same width, so the highway connection needs no projection.

    Args:
        width: H, input and output width.
        bidirectional: Whether half of the channels reads from right to left.
    """

    def __init__(self, width: int, bidirectional: bool) -> None:
        super().__init__()
        if bidirectional and width % 2:
            raise ValueError(f"a bidirectional SRU needs an even width, got {width}")
        self.directed = width // 2 if bidirectional else width
        self.project = nn.Linear(width, 3 * width)
        self.peephole = nn.Parameter(torch.zeros(2, width))
        self.scale = math.sqrt(3.0)  # keeps the variance of the highway at the start of training (section 3.2 there)
        with torch.no_grad():
            nn.init.uniform_(self.project.weight, -math.sqrt(3 / width), math.sqrt(3 / width))
            nn.init.zeros_(self.project.bias)

    def forward(self, x_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        """Maps `[B, T, H]` to `[B, T, H]`; padding must come last and does not influence the other positions."""
        candidate, forget, reset = self.project(x_BTH).chunk(3, -1)
        candidate = candidate * mask_BT[..., None]  # an empty state stays empty until the first real token
        inputs = [self._flip(value).unbind(1) for value in (candidate, forget, reset)]
        state = torch.zeros_like(inputs[0][0])
        states, resets = [], []
        for w, f, r in zip(*inputs, strict=True):
            resets.append(torch.addcmul(r, self.peephole[1], state))
            state = torch.lerp(w, state, torch.addcmul(f, self.peephole[0], state).sigmoid())
            states.append(state)
        state_BTH = self._flip(torch.stack(states, 1))
        reset_BTH = self._flip(torch.stack(resets, 1)).sigmoid()
        return torch.lerp(self.scale * x_BTH, state_BTH, reset_BTH)

    def _flip(self, value_BTH: Tensor) -> Tensor:
        """Turns the right-to-left channels round in time."""
        if self.directed == value_BTH.shape[-1]:
            return value_BTH
        forward, backward = value_BTH[..., : self.directed], value_BTH[..., self.directed :]
        return torch.cat([forward, backward.flip(1)], -1)
