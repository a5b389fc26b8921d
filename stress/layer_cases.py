"""LayerCase: a random case of MoE layers, and the batches it is fed.

Shape suffixes: B sequences, T tokens, K experts of a token, E experts, D model width, G devices.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot, relu, silu

from data.models.expert import ExpertFormat
from runtime.experts.grouped_mm import ExpertFunction
from stress.cases import Case, one_of


@dataclass(frozen=True)
class LayerCase(Case):
    """Geometry and circumstances of a chain of batches through some MoE layers.

    Attributes:
        world: Ranks.
        experts: E.
        devices: G; with several ranks as many as ranks.
        spare: Replica slots a device beyond those that make the slots divide.
        layers: MoE layers, all of which have their weights moved together.
        each: Experts a token, K; 0 is Switch's one-hot, which drops tokens.
        width: D, in steps that a grouped product takes or refuses.
        form: What an expert consists of.
        dtype: Of weights and hidden states.
        weights: Dtype of router weights where K is not 0.
        sequences: B.
        length: Tokens a sequence, padding included.
        padding: Where sequences have padding, which is not computed.
        capacity: Tokens a sequence that an expert takes, padding counted; 0 sets no limit.
        skew: Exponent of the experts' popularity.
        moves: When weights move: never, between batches, while a batch runs, or within a batch, as in generation.
        price: Tokens that an active expert counts as in the split.
        nodes: Nodes that the devices are divided over.
        budget: Experts that fit into memory, over all layers; 0 keeps all.
        host: Experts that fit into a tier below, within a budget; 0 has no such tier.
        halves: Whether several ranks run a layer in two halves.
        shared: Whether other ranks read weights from shared memory; else they are sent.
        steps: Batches.
    """

    world: int = one_of(1, 2, 4)
    experts: int = one_of(2, 1, 3, 4, 4, 5, 8, 8, 8, 8, 8, 12, 16, 40)
    devices: int = one_of(1, 2, 3, 4, 4, 6, 8)
    spare: int = one_of(0, 1, 1, 2, 3)
    layers: int = one_of(1, 1, 1, 2)
    each: int = one_of(0, 0, 0, 1, 2, 4, 8)
    width: int = one_of(4, 8, 10, 16, 32)
    form: str = one_of("plain", "plain", "gated", "interleaved", "biased")
    dtype: str = one_of("float32", "float32", "bfloat16")
    weights: str = one_of("same", "float32")
    sequences: int = one_of(1, 2, 3, 5)
    length: int = one_of(1, 2, 7, 16, 28)
    padding: str = one_of("none", "right", "left", "both")
    capacity: int = one_of(0, 1, 3, 8)
    skew: float = one_of(0.0, 0.5, 1.0, 3.0)
    moves: str = one_of("never", "between", "during", "within")
    price: int = one_of(0, 0, 1, 7, 40)
    nodes: int = one_of(1, 1, 2, 3)
    budget: int = one_of(0, 1, 2, 5, 40)
    host: int = one_of(0, 0, 3)
    halves: int = one_of(0, 1)
    shared: int = one_of(1, 0)
    steps: int = one_of(1, 4, 8, 16, 24)

    @property
    def redundant(self) -> int:
        """Replica slots over all devices."""
        return (-(-self.experts // self.devices) + self.spare) * self.devices - self.experts

    @property
    def possible(self) -> bool:
        """Whether the product takes these values."""
        return (
            (self.world == 1 or self.devices == self.world)
            and self.each <= self.experts
            and self.devices % self.nodes == 0
            and self.redundant <= self.experts * self.devices
            and (self.budget == 0 or self.devices == self.world)
        )

    @property
    def kind(self) -> torch.dtype:
        """The dtype."""
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    @cached_property
    def function(self) -> ExpertFunction:
        """What an expert computes."""
        width, inner = self.width, self.width + 8
        if self.form == "plain":
            return ExpertFunction(ExpertFormat.plain(inner, width), relu)
        names: tuple[str, ...] = ("gate_up_proj", "down_proj")
        shapes: tuple[tuple[int, ...], ...] = ((2 * inner, width), (width, inner))
        if self.form == "gated":
            return ExpertFunction(ExpertFormat(names, shapes, gated=True), _gate)
        if self.form == "interleaved":
            return ExpertFunction(ExpertFormat(names, shapes, gated=True, interleaved=True), _gate_by_turns)
        names = (*names, "first_bias", "second_bias")
        shapes = ((width, 2 * inner), (inner, width), (2 * inner,), (width,))
        return ExpertFunction(ExpertFormat(names, shapes, transposed=True, gated=True), _gate)


def _gate(inner: Tensor) -> Tensor:
    gate, up = inner.chunk(2, -1)
    return silu(gate) * up


def _gate_by_turns(inner: Tensor) -> Tensor:
    return silu(inner[..., ::2]) * inner[..., 1::2]


class LayerBatch(NamedTuple):
    """One batch of one layer: all sequences.

    Attributes:
        hidden: Hidden states, `[B, T, D]`.
        expert: Experts, `[B, T, K]`; -1 where a token is dropped.
        weight: Router weights, `[B, T, K]`.
    """

    hidden: Tensor
    expert: Tensor
    weight: Tensor

    @classmethod
    def drawn(cls, case: LayerCase, rng: np.random.Generator) -> "LayerBatch":
        """Draws hidden states and routes; Switch drops the tokens beyond an expert's capacity."""
        shape = case.sequences, case.length
        popular = np.arange(1, case.experts + 1.0) ** -case.skew
        keys = rng.gumbel(size=(*shape, case.experts)) + np.log(popular / popular.sum())
        expert_BTK = torch.from_numpy(np.argsort(-keys, axis=-1)[..., : max(case.each, 1)].copy())
        if not case.each and case.capacity:
            one_hot_BTE = one_hot(expert_BTK[..., 0], case.experts)
            expert_BTK[(one_hot_BTE.cumsum(1) * one_hot_BTE).sum(-1) > case.capacity] = -1
        hidden_BTD = torch.from_numpy(rng.standard_normal((*shape, case.width), dtype=np.float32)).to(case.kind)
        weight_BTK = torch.from_numpy(rng.random(expert_BTK.shape))
        same = case.weights == "same" or not case.each
        return cls(hidden_BTD, expert_BTK, weight_BTK.to(case.kind if same else torch.float32))


def computed_positions(case: LayerCase, rng: np.random.Generator) -> Tensor:
    """Which positions hold tokens, `[B, T]`: sequences of random length."""
    place_T = np.arange(case.length)
    before_B1, after_B1 = rng.integers(0, case.length, (2, case.sequences, 1))
    if case.padding in ("none", "right"):
        before_B1[:] = 0
    if case.padding in ("none", "left"):
        after_B1[:] = 0
    return torch.from_numpy((place_T >= before_B1) & (place_T < case.length - after_B1))
