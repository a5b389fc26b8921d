"""Records the routing of a bundled model on real text, and replays it in a model with other weights and sizes.

Which experts are needed is then real, while weights and sizes are those that the benchmark measures.
Shape suffixes: B sequences, T positions, P positions that a layer routes, K experts of a token, L MoE layers,
E logical experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from data.arrays import BoolArray, IntArray
from data.models.generation import padding_id
from data.models.layout import MoELayout
from data.models.model import LoadedModel
from data.text.batching import BatchingConfig, Decode, TextBatch
from data.text.corpus_stream import corpus_splits, open_stream
from data.traces.router_tap import RouterTap
from data.traces.trace import TokenBatch
from data.traces.tracer import input_tokens, model_inputs
from runtime.engine.adapter import needed_positions

Mode = Literal["full", "encoder", "generate"]


@dataclass(frozen=True)
class RecordedBatch:
    """A batch of text and the routing decisions of a bundled model.

    Attributes:
        tokens: Encoder tokens `[B, T]`; of a decoder-only model the prompts, without padding.
        decoder: Decoder input tokens `[B, U]`; of a decoder-only model what is written after the prompts.
        experts: Experts of every position, padding included: for each layer `[B, P, K]`. P is T or U; a layer of a
            decoder-only model routes both, one after the other.
        kept: Whether the position was within the expert's capacity, for each layer `[B, P]`.
        probability: Router probabilities or weights, in the shapes of `experts`.
        hidden: What each router read, for each layer `[B, P, width of the bundled model]`.
    """

    tokens: TokenBatch
    decoder: TokenBatch
    experts: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    probability: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]

    def mask(self, layer: int, layout: MoELayout) -> Tensor:
        """Positions of a layer that are not padding."""
        if layout.causal:
            return torch.cat([self.tokens.mask, self.decoder.mask], 1)
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
        """Dispatched tokens of each expert `[L, E]`, without padding and without what a decoder-only model writes."""
        routed = self.tokens.mask.shape[1] if layout.causal else None
        counts = [
            torch.bincount(
                experts[:, :routed][(kept & self.mask(layer, layout))[:, :routed]].long().flatten(),
                minlength=layout.num_experts,
            )
            for layer, (experts, kept) in enumerate(zip(self.experts, self.kept, strict=True))
        ]
        return torch.stack(counts).numpy()

    def steps(self, layout: MoELayout) -> int:
        """Passes of generation, each of which writes one token of every sequence."""
        return self.decoder.input_ids.shape[1] + layout.causal

    def columns(self, layer: int, layout: MoELayout, mode: Mode, step: int) -> slice:
        """Positions that a layer computes in a pass of generation, or in the one pass of another mode."""
        if layout.causal:
            prompt = self.tokens.mask.shape[1]
            return slice(prompt + step - 1, prompt + step) if step else slice(0, prompt)
        if layer < layout.num_input_layers:
            return slice(None) if step == 0 else slice(0)
        return slice(step, step + 1) if mode == "generate" else slice(None) if mode == "full" else slice(0)

    def passes(self, layout: MoELayout, mode: Mode) -> Iterator[BoolArray]:
        """Whether each expert is needed, `[L, E]`, in each pass: one for the batch, or one for each generation step."""
        for step in range(self.steps(layout) if mode == "generate" else 1):
            needed = np.zeros((layout.num_layers, layout.num_experts), dtype=bool)
            for layer, (experts, kept) in enumerate(zip(self.experts, self.kept, strict=True)):
                columns = self.columns(layer, layout, mode, step)
                written = mode == "generate" and layer >= layout.num_input_layers
                rows = torch.ones_like(kept) if written else kept & needed_positions(self.mask(layer, layout))
                needed[layer, experts[:, columns][rows[:, columns]].long().flatten().numpy()] = True
            yield needed


@torch.inference_mode()
def record(
    loaded: LoadedModel,
    batching: BatchingConfig,
    phases: Sequence[str],
    per_phase: int,
    split: str = "test",
    mode: Mode = "full",
) -> list[RecordedBatch]:
    """Runs a bundled model on the last `per_phase` batches of each phase of the offline corpus in one split.

    For generation a decoder-only model is given the first half of each text as its prompt, and writes the second;
    texts of a batch are cut to the shortest.
    """
    splits, kept = corpus_splits(batching), dict[str, list[RecordedBatch]]()
    decode: Decode = "none" if loaded.layout.causal else "teacher"
    for batch in open_stream(None, loaded.tokenizer, decode, batching):
        if splits[batch.number] == split and batch.phase in phases:
            one = _causal(loaded, batch, mode) if loaded.layout.causal else _switch(loaded, batch)
            kept.setdefault(batch.phase, []).append(one)
    return [batch for phase in phases for batch in kept.get(phase, [])[-per_phase:]]


def _switch(loaded: LoadedModel, batch: TextBatch) -> RecordedBatch:
    tokens, decoder = model_inputs(batch, loaded.model.config)
    routers = [f"{name.removesuffix('experts')}router" for name in loaded.layout.modules]
    return _recorded(
        loaded, tokens, decoder, routers, attention_mask=tokens.mask.long(), decoder_input_ids=decoder.input_ids
    )


def _causal(loaded: LoadedModel, batch: TextBatch, mode: Mode) -> RecordedBatch:
    ids = input_tokens(batch, padding_id(loaded.model.config))
    whole = int(ids.mask.sum(1).min())
    prompt = (whole + 1) // 2 if mode == "generate" else whole
    given, written = ids.input_ids[:, :prompt], ids.input_ids[:, prompt:whole]
    tokens, decoder = (TokenBatch(part, torch.ones_like(part, dtype=torch.bool)) for part in (given, written))
    return _recorded(loaded, tokens, decoder, loaded.layout.modules)


def _recorded(
    loaded: LoadedModel, tokens: TokenBatch, decoder: TokenBatch, readers: Sequence[str], **inputs: Tensor
) -> RecordedBatch:
    """One forward, with the hidden states that `readers`, the modules of routers or experts, are given."""
    layout, hidden, hooks = loaded.layout, list[Tensor](), []
    ids = torch.cat([tokens.input_ids, decoder.input_ids], 1) if layout.causal else tokens.input_ids
    for name in readers:
        reader = loaded.model.get_submodule(name)
        hooks.append(reader.register_forward_pre_hook(lambda module, args: hidden.append(args[0])))
    with RouterTap(loaded.model, layout) as tap:
        loaded.model(input_ids=ids, **inputs)
        calls = [layer[0] for layer in tap.take()]
    for hook in hooks:
        hook.remove()
    rows = len(ids)
    return RecordedBatch(
        tokens, decoder, tuple(call.experts.reshape(rows, -1, layout.experts_per_token) for call in calls),
        tuple(call.kept.reshape(rows, -1, layout.experts_per_token).all(-1) for call in calls),
        tuple(call.probability.reshape(rows, -1, layout.experts_per_token) for call in calls),
        tuple(state.view(rows, -1, state.shape[-1]) for state in hidden),
    )  # fmt: skip


class RecordedRouter:
    """Repeats the recorded decisions of one layer, call by call.

    Attributes:
        columns: Positions of the last call; a call takes those that follow.
    """

    def __init__(self, layer: int, num_experts: int) -> None:
        self.layer, self.num_experts = layer, num_experts
        self.columns = slice(0)
        self._batch: RecordedBatch | None = None

    @property
    def batch(self) -> RecordedBatch:
        """The current batch."""
        assert self._batch is not None, "no batch was set"
        return self._batch

    def begin(self, batch: RecordedBatch) -> None:
        """Begins a batch."""
        self._batch, self.columns = batch, slice(0)

    def following(self, width: int) -> slice:
        """The next positions."""
        return slice(self.columns.stop, self.columns.stop + width)

    def take(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Experts `[B, P, K]`, whether kept `[B, P]`, and probabilities `[B, P, K]` of the next positions."""
        self.columns = self.following(width)
        fields = (self.batch.experts, self.batch.kept, self.batch.probability)
        experts, kept, probability = (field[self.layer][:, self.columns] for field in fields)
        return experts, torch.ones_like(kept) if width == 1 else kept, probability  # one token fits into any capacity


class SwitchRouter(nn.Module):
    """A recorded router in the place of a Switch Transformer's."""

    def __init__(self, recorded: RecordedRouter) -> None:
        super().__init__()
        self._recorded, self.num_experts = recorded, recorded.num_experts

    def forward(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Same contract as `SwitchTransformersTop1Router`."""
        experts, kept, probability = self._recorded.take(hidden_BTD.shape[1])
        one_hot = nn.functional.one_hot(experts[..., 0].long(), self._recorded.num_experts) * kept[..., None]
        return one_hot.to(hidden_BTD.device), probability.to(hidden_BTD), hidden_BTD.new_empty(0)


def _choose(recorded: RecordedRouter) -> Any:
    """A hook that gives an experts module of a decoder-only model the recorded experts and weights."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_ND, index_NK, _ = args
        experts, _, weights = recorded.take(len(hidden_ND) // len(recorded.batch.tokens.mask))
        return hidden_ND, experts.flatten(0, 1).to(index_NK), weights.flatten(0, 1).to(hidden_ND)

    return hook


def play_back(model: Any, layout: MoELayout) -> list[RecordedRouter]:
    """Has each MoE layer of a model follow a `RecordedRouter`, and returns them in the order of layers."""
    routers = [RecordedRouter(layer, layout.num_experts) for layer in range(layout.num_layers)]
    for router, name in zip(routers, layout.modules, strict=True):
        if layout.causal:
            model.get_submodule(name).register_forward_pre_hook(_choose(router))
        else:
            model.set_submodule(f"{name.removesuffix('experts')}router", SwitchRouter(router))
    return routers
