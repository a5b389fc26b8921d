"""Tracer: runs batches through a Switch model and records the expert of every token as a RouterTrace.

Shape suffixes: B sequences, T encoder positions, U decoder positions, L MoE layers.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data.models.generation import GREEDY, GenerationSettings, padding_id, start_id
from data.models.model import LoadedModel
from data.text.batching import Decode, TextBatch
from data.traces.router_tap import RouterTap
from data.traces.trace import PADDING, RouterTrace, TokenBatch, pad_tokens


def model_inputs(batch: TextBatch, config: Any) -> tuple[TokenBatch, TokenBatch]:
    """Pads a batch to encoder tokens `[B, T]` and decoder inputs `[B, U]`; U is 0 if the batch has no targets.

    Decoder inputs are the targets shifted right: targets [7, 8, 1] are predicted from [start, 7, 8].
    """
    targets = pad_tokens(batch.targets, padding_id(config))
    start = torch.full_like(targets.input_ids[:, :1], start_id(config))
    decoder = TokenBatch(torch.cat([start, targets.input_ids[:, :-1]], 1), targets.mask)
    return input_tokens(batch, padding_id(config)), decoder


def input_tokens(batch: TextBatch, pad: int) -> TokenBatch:
    """Pads a batch's input tokens to `[B, T]`, with the request of each sequence.

    Raises:
        ValueError: If the batch holds only padding.
    """
    tokens = pad_tokens(batch.sources, pad)
    if not tokens.mask.any():
        raise ValueError(f"batch {batch.number} holds only padding; expected at least one token")
    return replace(tokens, requests=torch.from_numpy(batch.requests))


class Tracer:
    """Traces batches of one Switch model.

    Args:
        loaded: The model.
        tap: A `RouterTap` on the model, entered as a context.
        decode: "teacher" feeds the decoder the true targets, "generate" decodes greedily, "none" skips the decoder.
        max_new_tokens: Most tokens the decoder generates.
    """

    def __init__(self, loaded: LoadedModel, tap: RouterTap, decode: Decode, max_new_tokens: int) -> None:
        self.loaded, self.tap, self.decode, self.max_new_tokens = loaded, tap, decode, max_new_tokens
        self.steps = 1

    def traces(self, batch: TextBatch) -> list[RouterTrace]:
        """Runs one batch; returns the traces of its `steps`, here of one."""
        return [self.trace(batch)]

    @torch.inference_mode()
    def trace(self, batch: TextBatch) -> RouterTrace:
        """Runs one batch.

        Raises:
            ValueError: If it holds only padding, or a token that the model has no embedding for.
        """
        tokens, decoder = model_inputs(batch, self.loaded.model.config)
        self.loaded.check_ids(tokens.input_ids, decoder.input_ids)
        ids, attention = tokens.input_ids.to(self._device), tokens.mask.long().to(self._device)
        if self.decode == "generate":
            decoder = self._generate(ids, attention)
        else:
            hidden = self.loaded.model.encoder(input_ids=ids, attention_mask=attention)[0]
            if self.decode == "teacher":
                self.loaded.model.decoder(
                    input_ids=decoder.input_ids.to(self._device),
                    encoder_hidden_states=hidden,
                    encoder_attention_mask=attention,
                )
        return self._assemble(batch, tokens, decoder)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.loaded.model.device
        return device

    def _generate(self, ids: Tensor, attention: Tensor) -> TokenBatch:
        """Decodes greedily; returns the decoder's inputs `[B, U]`, padded after each sequence's end."""
        model, settings = self.loaded.model, GREEDY | {"max_new_tokens": self.max_new_tokens}
        inputs = model.generate(input_ids=ids, attention_mask=attention, **settings).cpu()[:, :-1]
        ends = torch.tensor(GenerationSettings.of(model, None, settings).ends, dtype=inputs.dtype)
        ended = torch.isin(inputs, ends)
        ended[:, 0] = False  # the start token, which may be one of them
        return TokenBatch(inputs, ended.cumsum(1) == 0)

    def _assemble(self, batch: TextBatch, tokens: TokenBatch, decoder: TokenBatch) -> RouterTrace:
        calls, split = self.tap.take(), self.loaded.layout.num_input_layers
        encoder = [call for layer in calls[:split] for call in layer]  # each encoder router runs once per batch
        found = [torch.cat([call.experts for call in layer], 1) for layer in calls if layer]
        if self.tap.top:
            found += [call.top_experts for call in encoder] + [call.top_probability.half() for call in encoder]
        on_host = iter(download(found))
        layers = [next(on_host)[..., None] if layer else None for layer in calls]
        top: dict[str, Tensor] = {}
        if self.tap.top:
            for name in ("top_experts", "top_probabilities"):
                stacked = torch.stack([next(on_host) for _ in encoder])
                top[name] = stacked.masked_fill(~tokens.mask[..., None], PADDING)
        return RouterTrace(
            batch.number, batch.phase, "", batch.segments, tokens, decoder,
            _stack(layers[:split], tokens), _stack(layers[split:], decoder), self.decode == "generate", **top,
        )  # fmt: skip


def download(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors of two bytes an entry on the host, copied in one piece: the host waits for their device once."""
    if not tensors:
        return []
    whole = torch.cat([tensor.contiguous().view(torch.int16).flatten() for tensor in tensors]).cpu()
    parts = torch.split(whole, [tensor.numel() for tensor in tensors])
    return [part.view(like.dtype).view(like.shape) for part, like in zip(parts, tensors, strict=True)]


def _stack(layers: list[Tensor | None], tokens: TokenBatch) -> Tensor:
    """Stacks expert ids to `[L, B, T, 1]` with padding marked; a layer that did not run is all padding."""
    shape = (*tokens.mask.shape, 1)
    rows = [torch.zeros(shape, dtype=torch.int16) if layer is None else layer for layer in layers]
    stacked = torch.stack(rows) if rows else torch.zeros((0, *shape), dtype=torch.int16)
    return stacked.masked_fill(~tokens.mask[..., None], PADDING)
