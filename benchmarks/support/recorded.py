"""Records the routing of the bundled model on real text, and replays it in a model with other weights and sizes.

Which experts are needed is then real, while weights and sizes are those that the benchmark measures.
Shape suffixes: B sequences, T positions, L MoE layers, E logical experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from data.arrays import BoolArray, IntArray
from data.models.layout import MoELayout
from data.models.model import LoadedModel
from data.text.batching import BatchingConfig
from data.text.corpus_stream import corpus_splits, open_stream
from data.traces.router_tap import RouterTap
from data.traces.trace import TokenBatch
from data.traces.tracer import model_inputs
from runtime.engine.adapter import needed_positions

Mode = Literal["full", "encoder", "generate"]


@dataclass(frozen=True)
class RecordedBatch:
    """A batch of text and the routing decisions of the bundled model.

    Attributes:
        tokens: Encoder tokens `[B, T]`.
        decoder: Decoder input tokens `[B, U]`.
        experts: Expert of every position, padding included: for each layer `[B, T]` or `[B, U]`.
        kept: Whether the position was within the expert's capacity, in the same shapes.
        probability: Router probability, in the same shapes.
        hidden: What each router read, of the same shapes with one more dimension, the bundled model's width.
    """

    tokens: TokenBatch
    decoder: TokenBatch
    experts: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    probability: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]

    def mask(self, layer: int, layout: MoELayout) -> Tensor:
        """Positions that are not padding, for the encoder or the decoder, whichever has the layer."""
        return self.tokens.mask if layer < layout.num_input_layers else self.decoder.mask

    def part(self, rows: slice) -> "RecordedBatch":
        """The batch with only these sequences."""
        tokens, decoder = (TokenBatch(all.input_ids[rows], all.mask[rows]) for all in (self.tokens, self.decoder))
        return RecordedBatch(
            tokens,
            decoder,
            *(tuple(one[rows] for one in field) for field in (self.experts, self.kept, self.probability, self.hidden)),
        )

    def load(self, layout: MoELayout) -> IntArray:
        """Dispatched tokens of each expert `[L, E]`, without padding."""
        kept = [kept & self.mask(layer, layout) for layer, kept in enumerate(self.kept)]
        counts = [
            torch.bincount(experts[keep].long(), minlength=layout.num_experts)
            for experts, keep in zip(self.experts, kept, strict=True)
        ]
        return torch.stack(counts).numpy()

    def passes(self, layout: MoELayout, mode: Mode) -> Iterator[BoolArray]:
        """Whether each expert is needed, `[L, E]`, in each pass: one for the batch, or one for each generation step."""
        steps = self.decoder.input_ids.shape[1] if mode == "generate" else 1
        for step in range(steps):
            needed = np.zeros((layout.num_layers, layout.num_experts), dtype=bool)
            for layer, (experts, kept) in enumerate(zip(self.experts, self.kept, strict=True)):
                if layer < layout.num_input_layers:
                    rows = kept & needed_positions(self.tokens.mask).view_as(kept) & (step == 0)
                elif mode == "generate":
                    experts, rows = experts[:, step], torch.ones_like(kept[:, step])
                else:
                    rows = kept & needed_positions(self.decoder.mask).view_as(kept) & (mode == "full")
                needed[layer, experts[rows].long().numpy()] = True
            yield needed


@torch.inference_mode()
def record(
    switch: LoadedModel, batching: BatchingConfig, phases: Sequence[str], per_phase: int, split: str = "test"
) -> list[RecordedBatch]:
    """Runs the bundled model on the last `per_phase` batches of each phase of the offline corpus in one split."""
    splits, kept = corpus_splits(batching), dict[str, list[RecordedBatch]]()
    hidden, hooks = list[Tensor](), []
    for name in switch.layout.modules:
        router = switch.model.get_submodule(f"{name.removesuffix('experts')}router")
        hooks.append(router.register_forward_pre_hook(lambda module, args: hidden.append(args[0])))
    with RouterTap(switch.model, switch.layout) as tap:
        for batch in open_stream(None, switch.tokenizer, "teacher", batching):
            if splits[batch.number] != split or batch.phase not in phases:
                continue
            tokens, decoder = model_inputs(batch, switch.model.config)
            hidden.clear()
            switch.model(
                input_ids=tokens.input_ids, attention_mask=tokens.mask.long(), decoder_input_ids=decoder.input_ids
            )
            calls = [layer[0] for layer in tap.take()]
            recorded = RecordedBatch(
                tokens, decoder, tuple(call.experts for call in calls), tuple(call.kept for call in calls),
                tuple(call.probability for call in calls), tuple(hidden),
            )  # fmt: skip
            kept.setdefault(batch.phase, []).append(recorded)
    for hook in hooks:
        hook.remove()
    return [batch for phase in phases for batch in kept.get(phase, [])[-per_phase:]]


class RecordedRouter(nn.Module):
    """Replaces a router and repeats the recorded decisions.

    Attributes:
        batch: The current batch.
        step: Next decoder position in generation, which runs one position at a time; None runs all positions at once.
    """

    def __init__(self, layer: int, num_experts: int) -> None:
        super().__init__()
        self.layer, self.num_experts = layer, num_experts
        self.batch: RecordedBatch | None = None
        self.step: int | None = None

    def forward(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Same contract as `SwitchTransformersTop1Router`."""
        assert self.batch is not None, "no batch was set"
        experts, kept = self.batch.experts[self.layer], self.batch.kept[self.layer]
        probability = self.batch.probability[self.layer]
        if self.step is not None:
            column = slice(self.step, self.step + 1)
            experts, kept, probability = experts[:, column], torch.ones_like(kept[:, column]), probability[:, column]
            self.step += 1
        one_hot = nn.functional.one_hot(experts.long(), self.num_experts) * kept[..., None]
        return one_hot.to(hidden_BTD.device), probability[..., None].to(hidden_BTD), hidden_BTD.new_empty(0)


def play_back(model: Any, layout: MoELayout) -> list[RecordedRouter]:
    """Replaces each router of a model by a `RecordedRouter`, and returns them in the order of layers."""
    routers = [RecordedRouter(layer, layout.num_experts) for layer in range(layout.num_layers)]
    for router, name in zip(routers, layout.modules, strict=True):
        model.set_submodule(f"{name.removesuffix('experts')}router", router)
    return routers
