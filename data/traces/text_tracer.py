"""TextTracer: runs text through a decoder-only model and records the experts of every token as RouterTraces.

Shape suffixes: B sequences, T prompt positions, N tokens of one call, K experts of a token, L MoE layers.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from data.models.generation import GREEDY
from data.models.model import LoadedModel
from data.text.batching import Decode, TextBatch
from data.traces.router_tap import RouterTap
from data.traces.trace import DECODE, PADDING, RouterTrace, TokenBatch, pad_tokens
from data.traces.tracer import download, input_tokens

CONTEXT = 128
"""Most tokens before a decode step that its trace keeps."""


class TextTracer:
    """Traces batches of one decoder-only model.

    Args:
        loaded: The model.
        tap: A `RouterTap` on the model, entered as a context.
        decode: "generate" writes `max_new_tokens` tokens after each text, greedily and past any end of sequence, and
            traces every step; otherwise the text alone is run.
        max_new_tokens: Tokens written after each text.
    """

    def __init__(self, loaded: LoadedModel, tap: RouterTap, decode: Decode, max_new_tokens: int) -> None:
        self.loaded, self.tap, self.generates = loaded, tap, decode == "generate"
        self.steps = max_new_tokens if self.generates else 1
        """Traces of one batch: the text, and one for each token written but the last, which is never fed."""

    @torch.inference_mode()
    def traces(self, batch: TextBatch) -> list[RouterTrace]:
        """Runs one batch; returns its `steps` traces.

        Raises:
            ValueError: If it holds only padding, or a token that the model has no embedding for.
        """
        tokens, model = input_tokens(batch, 0), self.loaded.model
        self.loaded.check_ids(tokens.input_ids)
        if not self.generates:
            ids, attention = tokens.input_ids.to(model.device), tokens.mask.long().to(model.device)
            model.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
            return [self._assemble(batch, tokens, tokens.mask, self._take()[0])]
        front = tokens.mask.flip(1)  # padding in front: what a sequence writes follows its last token
        ids = torch.zeros_like(tokens.input_ids)
        ids[front] = tokens.input_ids[tokens.mask]
        written = model.generate(
            input_ids=ids.to(model.device), attention_mask=front.long().to(model.device), pad_token_id=0,
            **GREEDY | {"max_new_tokens": self.steps, "min_new_tokens": self.steps},
        ).cpu()  # fmt: skip
        return list(self._steps(batch, tokens, front, written))

    def _steps(self, batch: TextBatch, tokens: TokenBatch, front: Tensor, written: Tensor) -> Iterator[RouterTrace]:
        """The trace of the text, then one for each decode step.

        Args:
            batch: The text.
            tokens: Its tokens, padded behind, `[B, T]`.
            front: True for its tokens where it is padded in front, bool `[B, T]`.
            written: The text padded in front and the tokens that follow it, `[B, T + steps]`.
        """
        routes, width, lengths = self._take(), front.shape[1], tokens.mask.sum(1).tolist()
        number = batch.number * self.steps
        yield replace(self._assemble(batch, tokens, front, routes[0]), batch=number)
        for step in range(1, self.steps):
            fed = width + step - 1
            starts = [max(width - length, fed - CONTEXT) for length in lengths]
            rows = [row[start : fed + 1].numpy() for row, start in zip(written, starts, strict=True)]
            known = pad_tokens(rows, 0)
            last = torch.arange(known.mask.shape[1]) == known.mask.sum(1, keepdim=True) - 1
            known = replace(known, context=known.mask & ~last, requests=tokens.requests)
            trace = self._assemble(batch, known, torch.ones(len(rows), 1, dtype=torch.bool), routes[step])
            yield replace(trace, batch=number + step, phase=DECODE)

    def _take(self) -> list[list[Tensor]]:
        """What the tap recorded, on the host: of each step the experts `[N, K]` of every layer.

        With likeliest experts, experts `[N, top]` and probabilities of every layer follow.
        """
        calls = self.tap.take()
        found = [[layer[step].experts for layer in calls] for step in range(len(calls[0]))]
        if self.tap.top:
            for step, layers in enumerate(found):
                layers += [layer[step].top_experts for layer in calls]
                layers += [layer[step].top_probability.half() for layer in calls]
        on_host = iter(download([tensor for layers in found for tensor in layers]))
        return [[next(on_host) for _ in layers] for layers in found]

    def _assemble(self, batch: TextBatch, tokens: TokenBatch, real: Tensor, found: list[Tensor]) -> RouterTrace:
        """One trace.

        Args:
            batch: The text.
            tokens: Tokens of this trace.
            real: True for the positions of the call that were real tokens, bool `[B, T]`.
            found: One step of `_take`.
        """

        def stacked(layers: list[Tensor], fill: int) -> Tensor:
            rows = torch.stack(layers)  # [L, N, K]
            result = rows.new_full((len(layers), *tokens.mask.shape, rows.shape[-1]), fill)
            result[:, tokens.computed] = rows[:, real.flatten()]  # both by sequence, then by position
            return result

        count, top = self.loaded.layout.num_layers, self.tap.top
        decoder = TokenBatch(tokens.input_ids[:, :0], tokens.mask[:, :0])
        experts = stacked(found[:count], PADDING)
        return RouterTrace(
            batch.number, batch.phase, "", batch.segments, tokens, decoder, experts,
            experts.new_zeros(0, len(batch.segments), 0, experts.shape[-1]),
            top_experts=stacked(found[count : 2 * count], 0) if top else None,
            top_probabilities=stacked(found[2 * count :], 0) if top else None,
        )  # fmt: skip
