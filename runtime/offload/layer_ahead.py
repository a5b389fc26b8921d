"""Layer ahead: which experts the next MoE layer needs, forecast while the current one computes.

A hidden state that one router reads tells much about the next router's choice. At each MoE layer a probe names the
experts of the layer after it. In generation the last layer names those of the first layer in the next step, and once
the tokens are written a second probe does so again, from their embeddings and these hidden states.

Probes learn from every pass, from nothing (`linear_probe`). A forecast decides what is prefetched and evicted; the
model's router decides what is computed.

Shape suffixes: T tokens of a pass, B sequences, U positions of a step, D model width, E logical experts.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.arrays import IntArray
from data.models.layout import MoELayout
from runtime.distributed.ranks import Ranks
from runtime.offload.cache import ExpertCache
from runtime.offload.linear_probe import LinearProbe, normalised
from runtime.offload.slots import LOAD_RESOLUTION, OffloadedSlots

State = dict[str, Tensor]
MOST_TOKENS = 256
"""Tokens of a pass above which nothing is forecast from layer to layer: in whole batches probes took 2 to 4 % of the
time and gained nothing, because the forecast of the batch tells nearly as well which experts many tokens need."""


class Said(NamedTuple):
    """What a probe said of some tokens before their layer runs: features `[T, D]`, probabilities `[T, E]`."""

    probe: LinearProbe
    features: Tensor
    probabilities: Tensor


class LayerProbes:
    """One MoE layer's side: learns from its router's choice, and forecasts the layer after it.

    Args:
        slots: The layer's slots on this rank.
        probe: Names this layer's experts from the hidden states of the layer before it.

    Attributes:
        after: The layer that runs next; None if none does, or where its hidden states are of other tokens.
        positions: Of the last layer, positions of each sequence in the current step of generation; 0 outside of it.
        state_BD: Of the last layer, features of each sequence's last position in the last step.
    """

    def __init__(self, slots: OffloadedSlots, probe: LinearProbe) -> None:
        self.slots, self.probe = slots, probe
        self.after: LayerProbes | None = None
        self.positions = 0
        self.state_BD: Tensor | None = None
        self._said: list[Said] = []

    def forecast(self, hidden_TD: Tensor, choice: Tensor, skipped_T: Tensor | None) -> Tensor:
        """See `runtime.experts.protocols.Probes`; in parts of an assignment, zeros if no layer is forecast."""
        self._learn(choice, skipped_T)
        after = self.after
        last = after is not None and after.slots.layer <= self.slots.layer
        ended = last and not self._steps_of(hidden_TD)
        if last and not ended:  # the last position of each sequence, of a prompt too
            hidden_TD = hidden_TD.view(-1, self.positions, hidden_TD.shape[1])[:, -1]
            skipped_T = None if skipped_T is None else skipped_T.view(-1, self.positions)[:, -1]
        if after is None or ended or len(hidden_TD) > MOST_TOKENS:
            return torch.zeros(self.probe.num_experts, dtype=torch.int32, device=hidden_TD.device)
        feature_TD = normalised(hidden_TD)
        if last:
            self.state_BD = feature_TD
        return after.say(after.probe, feature_TD, skipped_T, choice.shape[1])

    def use(self, forecast_E: IntArray) -> None:
        """See `runtime.experts.protocols.Probes`."""
        if self.after is not None and forecast_E.any():
            self.after.slots.foresee(forecast_E / LOAD_RESOLUTION)

    def say(self, probe: LinearProbe, feature_TD: Tensor, skipped_T: Tensor | None, each: int) -> Tensor:
        """Load that tokens bring this layer, int32 `[E]`, where the router chooses `each` experts for a token."""
        probability_TE = probe.probability(feature_TD)
        self._said.append(Said(probe, feature_TD, probability_TE))
        if skipped_T is not None:
            probability_TE = probability_TE.masked_fill(skipped_T[:, None], 0)
        return (probability_TE.sum(0) * (each * LOAD_RESOLUTION)).round().int()

    def forget(self) -> None:
        """Drops what was said of tokens that will not come."""
        self._said.clear()

    def _steps_of(self, hidden_TD: Tensor) -> bool:
        """Whether these are the states of a step of generation, as many for each sequence."""
        return self.positions > 0 and len(hidden_TD) % self.positions == 0

    def _learn(self, choice: Tensor, skipped_T: Tensor | None) -> None:
        said, self._said = self._said, []
        for probe, feature_TD, probability_TE in said:
            if len(feature_TD) != len(choice):  # another pass than the one that was forecast
                continue
            target_TE = shares(choice, probe.num_experts)
            if skipped_T is not None:
                target_TE = target_TE.masked_fill(skipped_T[:, None], 0)
            probe.learn(feature_TD, probability_TE, target_TE)


class ModelProbes:
    """The forecasts of all MoE layers.

    Args:
        layout: The model's MoE layers.
        slots: The slots of each layer on this rank.
        stepping: The layers that generation runs once for each token.
        embedding: The model's table of token embeddings.
        cache: The cache of this rank.
        ranks: The ranks.

    Attributes:
        embedding: As given.
        layers: Each layer's side, in order.
    """

    def __init__(
        self,
        layout: MoELayout,
        slots: Sequence[OffloadedSlots],
        stepping: slice,
        embedding: nn.Module,
        cache: ExpertCache,
        ranks: Ranks,
    ) -> None:
        self.embedding, self._cache, self._ranks = embedding, cache, ranks
        self._each, self.width, experts = layout.experts_per_token, layout.d_model, layout.num_experts
        self.layers = [LayerProbes(each, LinearProbe(self.width, experts, ranks.device)) for each in slots]
        self._written = LinearProbe(2 * self.width, experts, ranks.device)
        self._first, self._last = self.layers[stepping][0], self.layers[stepping][-1]
        for before, after in zip(self.layers, self.layers[1:], strict=False):
            before.after = None if after is self._first else after
        self._last.after = self._first

    def state(self) -> State:
        """What the probes have learned, by name."""
        return {f"{name}.{key}": value for name, probe in self._probes() for key, value in probe.state().items()}

    def restore(self, state: State) -> None:
        """Goes on from a `state`.

        Raises:
            ValueError: If it is of another model.
        """
        for name, probe in self._probes():
            try:
                probe.restore({key: state[f"{name}.{key}"] for key in probe.state() if f"{name}.{key}" in state})
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def _probes(self) -> Iterator[tuple[str, LinearProbe]]:
        yield "written", self._written
        for layer in self.layers:
            yield f"layer_{layer.slots.layer}", layer.probe

    def begin(self) -> None:
        """Begins a batch."""
        self._last.positions, self._last.state_BD = 0, None
        for layer in self.layers:
            layer.forget()

    def begin_step(self, ids_BU: Tensor, ended_B: Tensor | None = None) -> None:
        """Begins a step of generation: forecasts its first layer again, now that the tokens are written.

        Args:
            ids_BU: Tokens of the step.
            ended_B: Sequences that have ended; None means that none has.
        """
        state_BD, self._last.positions = self._last.state_BD, ids_BU.shape[1]
        forecast_E = torch.zeros(self._written.num_experts, dtype=torch.int32, device=ids_BU.device)
        if ids_BU.shape[1] == 1:
            written_BD = normalised(self.embedding(ids_BU[:, 0]))
            if state_BD is None or state_BD.shape != written_BD.shape:  # the first step, or another number of beams
                state_BD = torch.zeros_like(written_BD)
            forecast_E = self._first.say(self._written, torch.cat([written_BD, state_BD], 1), ended_B, self._each)
        load_E = self._ranks.gather(forecast_E).sum(0).cpu().numpy() / LOAD_RESOLUTION
        if load_E.any():
            self._first.slots.foresee(load_E)
            self._cache.replan()


def shares(choice: Tensor, num_experts: int) -> Tensor:
    """Share of each expert among those that a router chose for a token, `[T, E]`; 0 where the token was dropped."""
    if choice.dim() == 3:
        return choice[:, 0].float()
    shares_TE = torch.zeros(len(choice), num_experts, device=choice.device)
    return shares_TE.scatter_(1, choice, 1 / choice.shape[1])
