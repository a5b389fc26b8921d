"""Tracer: runs batches through a tapped Switch model and says where every token went.

Shape suffixes: B sequences, T encoder positions, U decoder positions, L MoE layers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data.models.switch import LoadedSwitch
from data.text.batching import Decode, TextBatch
from data.traces.router_tap import RouterCall, RouterTap
from data.traces.trace import PADDING, RouterTrace, TokenBatch, pad_tokens


def model_inputs(batch: TextBatch, config: Any) -> tuple[TokenBatch, TokenBatch]:
    """Encoder tokens `[B, T]` and, where there are targets, the decoder's inputs for them `[B, U]`, else `[B, 0]`."""
    targets = pad_tokens(batch.targets, config.pad_token_id)
    start = torch.full_like(targets.input_ids[:, :1], config.decoder_start_token_id or config.pad_token_id)
    decoder = TokenBatch(torch.cat([start, targets.input_ids[:, :-1]], 1), targets.mask)
    return pad_tokens(batch.sources, config.pad_token_id), decoder


class Tracer:
    """Traces batches of one model.

    Args:
        switch: The model.
        tap: A tap on it that is in place.
        decode: "teacher" feeds the decoder the truth, "generate" lets it write greedily, "none" leaves it out.
        max_new_tokens: Most tokens the decoder writes.
        probabilities: Whether router probabilities are kept.
    """

    def __init__(
        self, switch: LoadedSwitch, tap: RouterTap, decode: Decode, max_new_tokens: int, probabilities: bool
    ) -> None:
        self.switch, self.tap, self.decode = switch, tap, decode
        self.max_new_tokens, self.probabilities = max_new_tokens, probabilities

    @torch.inference_mode()
    def trace(self, batch: TextBatch) -> RouterTrace:
        """Runs one batch.

        Raises:
            ValueError: If it holds no real token.
        """
        tokens, decoder = model_inputs(batch, self.switch.model.config)
        if not tokens.mask.any():
            raise ValueError(f"batch {batch.number} holds only padding; expected at least one token")
        ids, attention = tokens.input_ids.to(self._device), tokens.mask.long().to(self._device)
        if self.decode == "generate":
            decoder = self._generate(ids, attention)
        else:
            hidden = self.switch.model.encoder(input_ids=ids, attention_mask=attention)[0]
            if self.decode == "teacher":
                self.switch.model.decoder(
                    input_ids=decoder.input_ids.to(self._device),
                    encoder_hidden_states=hidden,
                    encoder_attention_mask=attention,
                )
        return self._assemble(batch, tokens, decoder)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.switch.model.device
        return device

    def _generate(self, ids: Tensor, attention: Tensor) -> TokenBatch:
        """Greedy decoding; the decoder's inputs `[B, U]`, padding from a sequence's end on."""
        model = self.switch.model
        written = model.generate(
            input_ids=ids, attention_mask=attention, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1
        ).cpu()
        inputs = written[:, :-1]
        return TokenBatch(inputs, (inputs == model.config.eos_token_id).cumsum(1) == 0)

    def _assemble(self, batch: TextBatch, tokens: TokenBatch, decoder: TokenBatch) -> RouterTrace:
        calls, split = self.tap.take(), self.switch.layout.num_encoder_layers

        top: dict[str, Tensor] = {}
        if self.tap.top:
            top = {
                "encoder_top_experts": _top([call.top_experts for layer in calls[:split] for call in layer], tokens),
                "encoder_top_probabilities": _top(
                    [call.top_probability.half() for layer in calls[:split] for call in layer], tokens
                ),
            }

        def gather(read: Callable[[RouterCall], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            layers = [
                torch.cat([read(call) for call in layer], 1).cpu().to(dtype) if layer else None for layer in calls
            ]
            return _stack(layers[:split], tokens, dtype), _stack(layers[split:], decoder, dtype)

        encoder_experts, decoder_experts = gather(lambda call: call.experts, torch.int16)
        encoder_p, decoder_p = (
            gather(lambda call: call.probability, torch.float16) if self.probabilities else (None, None)
        )
        return RouterTrace(
            batch.number, batch.phase, "", batch.segments, tokens, decoder, encoder_experts, decoder_experts,
            self.decode == "generate", encoder_p, decoder_p, **top,
        )  # fmt: skip


def _top(layers: list[Tensor], tokens: TokenBatch) -> Tensor:
    """`[L_enc, B, T, K]` with padding marked; an encoder's routers run once a batch."""
    return torch.stack(layers).cpu().masked_fill(~tokens.mask[..., None], PADDING)


def _stack(layers: list[Tensor | None], tokens: TokenBatch, dtype: torch.dtype) -> Tensor:
    """`[L, B, T]` with padding marked; all padding for layers that did not run."""
    shape = tokens.mask.shape
    rows = [torch.zeros(shape, dtype=dtype) if layer is None else layer for layer in layers]
    stacked = torch.stack(rows) if rows else torch.zeros((0, *shape), dtype=dtype)
    return stacked.masked_fill(~tokens.mask, PADDING)
