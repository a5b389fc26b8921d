"""Layers of the network: SRU and LSTM stack, sparsemax attention, and moving averages of past loads. Plain torch.

`Recurrent` stacks `SRULayer`s (or torch's LSTM). A Simple Recurrent Unit takes one matrix product for all positions,
followed by an elementwise recurrence, with c' the state at the position before:

    f = sigmoid(W_f x + v_f * c' + b_f)        c = f * c' + (1 - f) * (W x + b)
    r = sigmoid(W_r x + v_r * c' + b_r)        h = r * c + (1 - r) * a * x

Source: Lei, Zhang, Wang, Dai and Artzi, "Simple Recurrent Units for Highly Parallelizable Recurrence" (EMNLP 2018),
equations 3 to 7. `SparseAttention` weights positions by `sparsemax` (Martins and Astudillo, ICML 2016), which sets most
weights to exactly 0. `HistoryMix` forecasts from past loads.

Shape suffixes: B sequences, T positions, H hidden width, K past batches, R moving averages, L MoE layers, E experts.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

RATES = (1.0, 0.5, 0.2, 0.08, 0.03)
"""Weight of the last batch in each moving average; 1 is the last batch alone."""
WINDOW = 64
"""Most past batches that a forecast uses."""


class Recurrence(torch.autograd.Function):
    """The states c of all positions, from W x + b, the forget gates before their sigmoid, and v_f.

    The forward pass takes three operations a position, the backward pass one: with g the gradient of c,
    g(t) = dc(t) + g(t+1) * dc(t+1)/dc(t), and all other gradients follow from g for all positions together.
    """

    @staticmethod
    def forward(ctx: Any, candidate_TBH: Tensor, forget_TBH: Tensor, peephole_H: Tensor) -> Tensor:
        """Returns the states `[T, B, H]`; the state before the first position is zero."""
        gate_TBH, state_TBH = torch.empty_like(forget_TBH), torch.empty_like(candidate_TBH)
        state = torch.zeros_like(candidate_TBH[0])
        for candidate, forget, gate, out in zip(
            candidate_TBH.unbind(), forget_TBH.unbind(), gate_TBH.unbind(), state_TBH.unbind(), strict=True
        ):
            torch.addcmul(forget, peephole_H, state, out=gate).sigmoid_()
            state = torch.lerp(candidate, state, gate, out=out)
        ctx.save_for_backward(candidate_TBH, gate_TBH, state_TBH, peephole_H)
        return state_TBH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of the three inputs."""
        candidate_TBH, gate_TBH, state_TBH, peephole_H = ctx.saved_tensors
        before_TBH = shifted(state_TBH)
        through_gate_TBH = (before_TBH - candidate_TBH) * gate_TBH * (1 - gate_TBH)
        carry_TBH = torch.addcmul(gate_TBH, through_gate_TBH, peephole_H)
        total_TBH = gradients[0].clone()
        steps = total_TBH.unbind()
        for now, later, carry in zip(steps[-2::-1], steps[:0:-1], carry_TBH.unbind()[:0:-1], strict=True):
            now.addcmul_(later, carry)
        forget_TBH = total_TBH * through_gate_TBH
        return total_TBH * (1 - gate_TBH), forget_TBH, (forget_TBH * before_TBH).sum((0, 1))


def unrolled(candidate_TBH: Tensor, forget_TBH: Tensor, peephole_H: Tensor) -> Tensor:
    """The states of `Recurrence`, `[T, B, H]`, in operations that `torch.export` can trace."""
    states = [torch.zeros_like(candidate_TBH[0])]
    for candidate, forget in zip(candidate_TBH.unbind(), forget_TBH.unbind(), strict=True):
        gate = torch.addcmul(forget, peephole_H, states[-1]).sigmoid()
        states.append(torch.lerp(candidate, states[-1], gate))
    return torch.stack(states[1:])


def shifted(state_TBH: Tensor) -> Tensor:
    """The state before each position: zeros, then all states but the last."""
    return torch.cat([torch.zeros_like(state_TBH[:1]), state_TBH[:-1]])


class SRULayer(nn.Module):
    """One SRU layer; input and output have the same width, so the highway connection needs no projection.

    Args:
        width: H, input and output width.
        bidirectional: Whether half of the channels reads from right to left.
    """

    def __init__(self, width: int, bidirectional: bool) -> None:
        super().__init__()
        if bidirectional and width % 2:
            raise ValueError(f"a bidirectional SRU needs an even width, got {width}")
        self.forward_width = width // 2 if bidirectional else width
        self.project = nn.Linear(width, 3 * width)
        self.peephole = nn.Parameter(torch.zeros(2, width))
        self.scale = math.sqrt(3.0)  # keeps the variance of the highway at initialisation (their section 3.2)
        nn.init.uniform_(self.project.weight, -math.sqrt(3 / width), math.sqrt(3 / width))
        nn.init.zeros_(self.project.bias)

    def forward(self, x_TBH: Tensor, mask_TB: Tensor) -> Tensor:
        """Maps `[T, B, H]` to the same shape; padding must come last and does not affect the other positions."""
        exact = self.peephole.dtype  # mixed precision rounds the matrix product only, never the state
        candidate, forget, reset = self.project(x_TBH).to(exact).chunk(3, -1)
        candidate = candidate * mask_TB[..., None]  # right to left, the state stays zero until the first real token
        recurrence: Any = unrolled if torch.compiler.is_exporting() else Recurrence.apply
        state: Tensor = recurrence(self._turned(candidate), self._turned(forget), self.peephole[0])
        gate = torch.addcmul(reset, self.peephole[1], self._turned(shifted(state))).sigmoid()
        return torch.lerp(self.scale * x_TBH.to(exact), self._turned(state), gate)

    def _turned(self, value_TBH: Tensor) -> Tensor:
        """The value with its right-to-left channels reversed in time."""
        if self.forward_width == value_TBH.shape[-1]:
            return value_TBH
        ahead, back = value_TBH[..., : self.forward_width], value_TBH[..., self.forward_width :]
        return torch.cat([ahead, back.flip(0)], -1)


class Recurrent(nn.Module):
    """A stack of recurrent layers, `[B, T, H]` to `[B, T, H]`; padding does not affect the real tokens.

    Args:
        cell: "sru" or "lstm".
        width: H.
        depth: Number of layers.
        bidirectional: Whether half of the channels reads from right to left.
    """

    def __init__(self, cell: str, width: int, depth: int, bidirectional: bool) -> None:
        super().__init__()
        self.layers: nn.ModuleList | None = None
        if cell == "sru":
            self.layers = nn.ModuleList(SRULayer(width, bidirectional) for _ in range(depth))
        else:
            half = width // 2 if bidirectional else width
            self.stack = nn.LSTM(width, half, depth, batch_first=True, bidirectional=bidirectional)

    def forward(self, x_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        """Runs all layers; the output at padded positions is undefined."""
        if self.layers is not None:
            x_TBH, mask_TB = x_BTH.transpose(0, 1), mask_BT.T
            for layer in self.layers:
                x_TBH = layer(x_TBH, mask_TB)
            return x_TBH.transpose(0, 1)
        packed = pack_padded_sequence(x_BTH, mask_BT.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        output: Tensor = pad_packed_sequence(self.stack(packed)[0], batch_first=True, total_length=x_BTH.shape[1])[0]
        return output


def sparsemax(scores: Tensor) -> Tensor:
    """The point of the probability simplex nearest to the scores, over the last dimension; same shape.

    Scores (0.1, 1.1, 0.2) give (0, 0.95, 0.05): all scores are lowered by 0.15, and negative values become 0.
    """
    ordered = scores.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    support = (rank * ordered > excess).sum(-1, keepdim=True)
    threshold = excess.gather(-1, support - 1) / support
    return (scores - threshold).clamp(min=0)


class SparseAttention(nn.Module):
    """Single-head self-attention with sparsemax weights over the real tokens of each sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(width, 3 * width)

    def forward(self, x_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        """Maps `[B, T, H]` to `[B, T, H]`."""
        query, key, value = self.query_key_value(x_BTH).chunk(3, -1)
        scores_BTT = query @ key.transpose(1, 2) / math.sqrt(x_BTH.shape[-1])
        lowest = torch.finfo(scores_BTT.dtype).min / x_BTH.shape[1]  # the sum of a row of these is still finite
        weights_BTT = sparsemax(scores_BTT.masked_fill(~mask_BT[:, None], lowest).float())
        attended: Tensor = weights_BTT @ value
        return attended


def moving_averages(history_KLE: Tensor) -> Tensor:
    """Exponential moving averages of load shares, one for each of `RATES`, `[R, L, E]`.

    The shares of a layer without load, and of an empty history, count as uniform.
    """
    if not len(history_KLE):
        return history_KLE.new_full((len(RATES), *history_KLE.shape[1:]), 1 / history_KLE.shape[-1])
    total = history_KLE.sum(-1, keepdim=True)
    share = torch.where(total > 0, history_KLE / total.clamp(min=1), 1 / history_KLE.shape[-1])
    age = torch.arange(len(share) - 1, -1, -1, device=share.device)
    weight_RK = torch.stack([(1 - rate) ** age for rate in RATES])  # 0 ** 0 is 1: rate 1 keeps the last batch alone
    return torch.einsum("rk,kle->rle", weight_RK / weight_RK.sum(-1, keepdim=True), share)


class HistoryMix(nn.Module):
    """A forecast from past loads, and its blend with the forecast from tokens.

    Args:
        num_layers: L.
        blends: Whether past loads are blended into the forecast from tokens.
    """

    def __init__(self, num_layers: int, blends: bool) -> None:
        super().__init__()
        self.rate_logits = nn.Parameter(torch.zeros(num_layers, len(RATES)))
        self.trust_logits = nn.Parameter(torch.full((num_layers,), -2.0)) if blends else None

    def share(self, history_KLE: Tensor) -> Tensor:
        """Forecast share of each expert from the last `WINDOW` loads, `[L, E]`."""
        return torch.einsum("lr,rle->le", self.rate_logits.softmax(-1), moving_averages(history_KLE[-WINDOW:]))

    def blend(self, load_LE: Tensor, history_KLE: Tensor) -> Tensor:
        """Moves a load forecast from tokens towards history, by a learned weight per layer; layer sums are kept."""
        if self.trust_logits is None:
            return load_LE
        trust = self.trust_logits.sigmoid()[:, None] * (len(history_KLE) > 0)
        return torch.lerp(load_LE, self.share(history_KLE) * load_LE.sum(-1, keepdim=True), trust)
