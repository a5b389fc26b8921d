"""LoadNetwork: tokens of the coming batch and past loads in, predicted load of every expert out. Plain torch.

Input layers (the encoder's, or all of a decoder-only model): one head per MoE layer gives every token a distribution
over experts, of which each of its K choices is a draw. The distributions are summed per sequence, limited to the expert
capacity, and summed over sequences. Context is read but not counted.
Decoder layers: the decoder's tokens are not known ahead. Each input token predicts how many decoder tokens it causes
and which experts they go to (at a masked span: the missing words).
The forecast can be blended with past loads; without tokens, past loads alone give the forecast.

Shape suffixes: B sequences, T positions, D host width, H hidden width, K past batches, L MoE layers, E experts.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from data.arguments import check_whole
from data.models.layout import MoELayout
from data.traces.trace import UNKNOWN
from predictor.layers import HistoryMix, Recurrent, SparseAttention

Cell = Literal["sru", "lstm"]
MOST_WIDTH, MOST_DEPTH = 16384, 64


@dataclass(frozen=True)
class Architecture:
    """Shape of the network; the defaults measured best (docs/log.md).

    Attributes:
        cell: Recurrent cell: "sru" (the paper's) or "lstm" (SiDA's).
        width: H, an even number.
        depth: Number of recurrent layers.
        bidirectional: Whether half of each layer's channels reads from right to left.
        sparse_attention: Whether a sparsemax attention with a residual connection follows the recurrent layers.
        history: Whether past loads are blended into forecasts from tokens; forecasts without tokens always use them.
        own_embedding: Whether the network learns its own token embeddings, of width H, instead of reading the host
            model's. Always so where the trace's model has none.
    """

    cell: Cell = "sru"
    width: int = 128
    depth: int = 2
    bidirectional: bool = True
    sparse_attention: bool = False
    history: bool = False
    own_embedding: bool = False

    def __post_init__(self) -> None:
        if self.cell not in ("sru", "lstm"):
            raise ValueError(f"cell is {self.cell!r}, expected 'sru' or 'lstm'")
        check_whole("width", self.width, 2, MOST_WIDTH)
        check_whole("depth", self.depth, 1, MOST_DEPTH)
        if self.width % 2:
            raise ValueError(f"width is {self.width}, expected an even number")


class Prediction(NamedTuple):
    """The network's output for one batch.

    Attributes:
        token_logits: Logits over experts of each token in each input layer, `[B, T, L_in, E]`.
        load: Expected dispatched assignments, `[L, E]`.
        variance: Variance of the load if tokens choose their experts independently, `[L, E]`; without gradient.
        sequence_load: Expected assignments of each sequence, before history is blended in, `[B, L, E]`.
        features: Mean hidden state of each sequence's tokens that the batch computes, `[B, H]`; without gradient.
    """

    token_logits: Tensor
    load: Tensor
    variance: Tensor
    sequence_load: Tensor
    features: Tensor


def capped(mean: Tensor, variance: Tensor, capacity: int | None) -> Tensor:
    """Expected value of min(N, capacity) for a normally distributed count N; same shape as `mean`.

    A mean of 10 with variance 4 and a capacity of 10 gives 9.2: half of the distribution lies above the capacity.
    Without a capacity it is the mean.
    """
    if capacity is None:
        return mean
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
        self.top_k, self.num_encoder_layers = layout.experts_per_token, layout.num_input_layers
        self.num_decoder_layers = layout.num_layers - layout.num_input_layers
        width = architecture.width
        own = architecture.own_embedding or not layout.d_model
        self.embedding = nn.Embedding(layout.vocab_size, width) if own else None
        self.unknown = nn.Parameter(torch.zeros(width if own else layout.d_model)) if layout.causal else None
        """Embedding of a token that is not written yet; encoders know all their tokens."""
        self.enter = nn.Linear(width if own else layout.d_model, width)
        self.context = Recurrent(architecture.cell, width, architecture.depth, architecture.bidirectional)
        self.attention = SparseAttention(width) if architecture.sparse_attention else None
        self.encoder_heads = nn.Linear(width, self.num_encoder_layers * self.num_experts)
        if self.num_decoder_layers:
            self.decoder_heads = nn.Linear(width, self.num_decoder_layers * self.num_experts)
            self.decoder_length = nn.Linear(width, 1)
        self.history = HistoryMix(layout.num_layers, architecture.history)

    def embed(self, ids_BT: Tensor, table_VD: Tensor | None) -> Tensor:
        """Embeddings `[B, T, D]` of tokens, from the network's own table or the host model's."""
        table = table_VD if self.embedding is None else self.embedding.weight
        assert table is not None, "a network without its own table needs the host model's"
        if self.unknown is None:
            return nn.functional.embedding(ids_BT, table)
        x_BTD = nn.functional.embedding(ids_BT.clamp(min=0), table)
        return torch.where(ids_BT[..., None] == UNKNOWN, self.unknown, x_BTD)

    def forward(
        self, x_BTD: Tensor, mask_BT: Tensor, history_KLE: Tensor, computed_BT: Tensor | None = None
    ) -> Prediction:
        """Forecasts the load of a batch.

        Args:
            x_BTD: Its token embeddings.
            mask_BT: True for real tokens.
            history_KLE: Loads of the batches before it.
            computed_BT: True for the tokens that the batch computes; None for all real ones.
        """
        hidden = self.enter(x_BTD)
        hidden = self.context(hidden, mask_BT)
        if self.attention is not None:
            hidden = hidden + self.attention(hidden, mask_BT)
        with torch.autocast(hidden.device.type, enabled=False):  # sums over thousands of tokens need full precision
            hidden = hidden.to(self.enter.weight.dtype)
            if computed_BT is None or computed_BT is mask_BT:
                return self._forecast(hidden, self._logits(hidden), mask_BT, history_KLE)
            logits_BTLE = hidden.new_zeros(*mask_BT.shape, self.num_encoder_layers, self.num_experts)
            logits_BTLE[computed_BT] = self._logits(hidden[computed_BT])  # none of the context's is used
            return self._forecast(hidden, logits_BTLE, computed_BT, history_KLE)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits over experts in each input layer, `[..., L_in, E]`, from hidden states `[..., H]`."""
        logits: Tensor = self.encoder_heads(hidden)
        return logits.view(*hidden.shape[:-1], self.num_encoder_layers, self.num_experts)

    def _forecast(self, hidden: Tensor, logits: Tensor, mask_BT: Tensor, history_KLE: Tensor) -> Prediction:
        """The prediction from the hidden state `[B, T, H]` and the logits of every token."""
        counted_BT1 = mask_BT[..., None].to(logits.dtype)
        load_BLE, variance_BLE = self._expected_load(logits, counted_BT1)
        if self.num_decoder_layers:
            decoder_load, decoder_variance = self._decoder_load(hidden, mask_BT)
            load_BLE = torch.cat([load_BLE, decoder_load], 1)
            variance_BLE = torch.cat([variance_BLE, decoder_variance], 1)
        load = self.history.blend(load_BLE.sum(0), history_KLE)
        with torch.no_grad():
            features_BH = (counted_BT1.transpose(1, 2) @ hidden).squeeze(1) / counted_BT1.sum(1).clamp(min=1)
        return Prediction(logits, load, variance_BLE.sum(0), load_BLE, features_BH)

    def _decoder_load(self, hidden_BTH: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Expected decoder load of each sequence and its variance, `[B, L_dec, E]` each."""
        logits = self.decoder_heads(hidden_BTH).unflatten(-1, (self.num_decoder_layers, self.num_experts))
        tokens_BT1 = nn.functional.softplus(self.decoder_length(hidden_BTH)) * mask_BT[..., None].to(hidden_BTH.dtype)
        return self._expected_load(logits, tokens_BT1)

    def _expected_load(self, logits_BTLE: Tensor, tokens_BT1: Tensor) -> tuple[Tensor, Tensor]:
        """Expected load, limited by the capacity, and its variance before that limit, `[B, L, E]` each.

        A token goes to an expert with K times its share; a share is 1 / K at most, up to the error of the network.

        Args:
            logits_BTLE: Logits over experts of each position and layer.
            tokens_BT1: Number of tokens that each position contributes; 0 on padding.
        """
        share_BTM, tokens_B1T = logits_BTLE.softmax(-1).flatten(2), tokens_BT1.transpose(1, 2)
        mean_BLE = self.top_k * (tokens_B1T @ share_BTM).view(logits_BTLE.shape[0], *logits_BTLE.shape[2:])
        with torch.no_grad():  # it only smooths the capacity limit; its gradient would add 10 % to a step
            squares_BLE = (tokens_B1T @ share_BTM.square()).view_as(mean_BLE)
            variance_BLE = (mean_BLE - self.top_k**2 * squares_BLE).clamp(min=0)
        return capped(mean_BLE, variance_BLE, self.capacity), variance_BLE
