"""The network: token embeddings of the coming batch and past loads in, load of every expert out. Pure torch.

Encoder layers: a head per MoE layer gives every token a distribution over experts, and their sum under the expert
capacity is the load. Decoder layers: tokens are not known yet, so each sequence's pooled state gives a distribution.
Both are blended with the history of loads, which is all there is when the queue is empty.

Shape suffixes: B sequences, T positions, D host width, H hidden width, K past batches, L MoE layers, E experts.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from data.layout import MoELayout
from predictor.attention import SparseAttention
from predictor.history import HistoryMix
from predictor.recurrent import Recurrent

Cell = Literal["sru", "lstm", "gru"]


@dataclass(frozen=True)
class Architecture:
    """Shape of the network; the defaults are what measured best (docs/log.md).

    Attributes:
        cell: Recurrent cell: "sru" (the paper's), "lstm" (SiDA's) or "gru".
        width: H.
        depth: Recurrent layers.
        bidirectional: Whether half of each layer's channels reads from right to left.
        sparse_attention: Whether a sparsemax attention with a residual follows the recurrence.
        history: Whether past loads are blended into the forecast from tokens; without tokens they always decide.
    """

    cell: Cell = "sru"
    width: int = 128
    depth: int = 2
    bidirectional: bool = True
    sparse_attention: bool = False
    history: bool = True

    def __post_init__(self) -> None:
        if self.cell not in ("sru", "lstm", "gru"):
            raise ValueError(f"cell is {self.cell!r}, expected 'sru', 'lstm' or 'gru'")
        if self.width < 2 or self.width % 2 or self.depth < 1:
            raise ValueError(f"width {self.width} and depth {self.depth}: expected an even width and depth 1 or more")


class Prediction(NamedTuple):
    """What the network says about one batch.

    Attributes:
        token_logits: Score of each expert for each token and encoder layer, `[B, T, L_enc, E]`.
        load: Expected dispatched tokens, `[L, E]`.
        variance: Variance of the load if tokens chose independently, `[L, E]`.
    """

    token_logits: Tensor
    load: Tensor
    variance: Tensor


def capped(mean: Tensor, variance: Tensor, capacity: int) -> Tensor:
    """Expected value of min(N, capacity) for a count N with this mean and variance, taken as normal; same shape."""
    deviation = (variance + 1e-6).sqrt()
    z = (mean - capacity) / deviation
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    over = (mean - capacity) * torch.special.ndtr(z) + deviation * density
    expected: Tensor = (mean - over).clamp(min=0)
    return expected


class LoadNetwork(nn.Module):
    """Forecasts all MoE layers of one host model at once."""

    def __init__(self, layout: MoELayout, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.capacity, self.num_experts = layout.expert_capacity, layout.num_experts
        self.num_encoder_layers = layout.num_encoder_layers
        self.num_decoder_layers = layout.num_layers - layout.num_encoder_layers
        width = architecture.width
        self.enter = nn.Linear(layout.d_model, width)
        self.context = Recurrent(architecture.cell, width, architecture.depth, architecture.bidirectional)
        self.attention = SparseAttention(width) if architecture.sparse_attention else None
        self.encoder_heads = nn.Linear(width, self.num_encoder_layers * self.num_experts)
        if self.num_decoder_layers:
            self.decoder_heads = nn.Linear(width, self.num_decoder_layers * self.num_experts)
            self.decoder_length = nn.Linear(width, 1)
        self.history = HistoryMix(layout.num_layers, architecture.history)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor, history_KLE: Tensor) -> Prediction:
        """Forecasts the load of a batch from its token embeddings and the loads of the batches before it."""
        hidden = self.enter(x_BTD)
        hidden = self.context(hidden, mask_BT)
        if self.attention is not None:
            hidden = hidden + self.attention(hidden, mask_BT)
        logits = self.encoder_heads(hidden).unflatten(-1, (self.num_encoder_layers, self.num_experts))
        load, variance = self._encoder_load(logits, mask_BT)
        if self.num_decoder_layers:
            decoder_load, decoder_variance = self._decoder_load(hidden, mask_BT)
            load, variance = torch.cat([load, decoder_load]), torch.cat([variance, decoder_variance])
        return Prediction(logits, self.history.blend(load, history_KLE), variance)

    def _encoder_load(self, logits_BTLE: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Expected load and its variance, `[L_enc, E]` each: token probabilities summed under the capacity."""
        share_BTM = logits_BTLE.softmax(-1).flatten(2)
        real_B1T = mask_BT[:, None].to(share_BTM.dtype)  # a product with the mask sums over the real tokens
        mean_BLE = (real_B1T @ share_BTM).view(-1, self.num_encoder_layers, self.num_experts)
        variance_BLE = mean_BLE - (real_B1T @ share_BTM**2).view_as(mean_BLE)
        return capped(mean_BLE, variance_BLE, self.capacity).sum(0), variance_BLE.sum(0)

    def _decoder_load(self, hidden_BTH: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Expected load and its variance, `[L_dec, E]` each, from the mean state of each sequence."""
        length_B = mask_BT.sum(1).clamp(min=1)
        pooled_BH = (hidden_BTH * mask_BT[..., None]).sum(1) / length_B[:, None]
        share = self.decoder_heads(pooled_BH).unflatten(-1, (self.num_decoder_layers, self.num_experts)).softmax(-1)
        tokens_B = nn.functional.softplus(self.decoder_length(pooled_BH))[:, 0] * length_B
        mean_BLE = share * tokens_B[:, None, None]
        variance_BLE = mean_BLE * (1 - share)
        return capped(mean_BLE, variance_BLE, self.capacity).sum(0), variance_BLE.sum(0)
