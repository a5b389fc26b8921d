"""Adapter: what the engine needs to know about a family, and how it puts its layers into the model.

There are two kinds. `SwitchAdapter` replaces experts modules. `RegisteredAdapter` serves all families with the experts
interface of transformers and replaces nothing: it sets the experts implementation. Either takes the router's choice and
weights as the router gave them.

Shape suffixes: B sequences, T positions of the input, U positions of the decoder, L MoE layers.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data.models.expert import ExpertFormat
from data.models.layout import SWITCH
from data.models.model import LoadedModel
from data.models.registered import attends_only
from data.traces.trace import TokenBatch
from runtime.experts.grouped_mm import ExpertFunction
from runtime.experts.interface import NAME, connect, connected, disconnect
from runtime.experts.layer import ReplicatedExperts
from runtime.experts.weights import ExpertSource, ModuleWeights, StackedWeights


class Adapter(Protocol):
    """One family's side of the engine."""

    functions: list[ExpertFunction]
    """What the experts of each MoE layer compute, `[L]`."""
    like: Tensor
    """A tensor with the dtype of the experts, on the device that computes."""
    stepper: nn.Module
    """The module that generation calls once for each token."""
    step_layers: slice
    """The MoE layers in it."""

    def weights(self) -> ExpertSource:
        """The live model's experts."""
        ...

    def installed(self) -> bool:
        """Whether an engine runs the model."""
        ...

    def install(self, layers: Sequence[ReplicatedExperts]) -> None:
        """Has the model compute with these layers."""
        ...

    def remove(self) -> None:
        """Makes the model what it was."""
        ...

    def skipped(
        self, tokens: TokenBatch, decoder: TokenBatch | None, read_B: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Positions that need not be computed, flat: of the input layers `[B x T]`, of the decoder's `[B x U]`.

        Args:
            tokens: Input tokens `[B, T]`.
            decoder: Decoder tokens `[B, U]`; None computes all of them.
            read_B: Sequences whose encoder states a decoder reads.
        """
        ...

    def step_needs(self, input_ids: Tensor, attention_mask: Any) -> Tensor | None:
        """Positions of one call of `stepper` that must be computed, `[B, U]`; None means all."""
        ...


def adapter_of(loaded: LoadedModel) -> Adapter:
    """The adapter of a model's family."""
    return SwitchAdapter(loaded) if loaded.layout.family == SWITCH else RegisteredAdapter(loaded)


def needed_positions(mask: Tensor) -> Tensor:
    """Positions that a model with expert capacity must compute, bool `[B, T]`: all up to the last real token.

    Padding behind the last token is never read. Padding in front is computed: it takes up experts' capacity, and so
    decides which of the tokens behind it are dropped.
    """
    return mask.flip(1).cummax(1).values.flip(1)


class SwitchAdapter:
    """Replaces the experts modules of a Switch Transformer.

    Args:
        loaded: The model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        from transformers.activations import ACT2FN

        self._loaded, self._model, layout = loaded, loaded.model, loaded.layout
        function = ExpertFunction(ExpertFormat.of(loaded.model, layout), ACT2FN[loaded.model.config.dense_act_fn])
        self.functions = [function] * layout.num_layers
        self.like: Tensor = loaded.model.shared.weight
        self.stepper: nn.Module = loaded.model.decoder
        self.step_layers = slice(layout.num_input_layers, None)
        self._before: list[nn.Module] = [loaded.model.get_submodule(name) for name in layout.modules]

    def weights(self) -> ExpertSource:
        """The live model's experts."""
        return ModuleWeights(self._model, self._loaded.layout)

    def installed(self) -> bool:
        """Whether an engine runs the model."""
        return any(isinstance(module, ReplicatedExperts) for module in self._before)

    def install(self, layers: Sequence[ReplicatedExperts]) -> None:
        """Replaces the experts modules."""
        for name, layer, module in zip(self._loaded.layout.modules, layers, self._before, strict=True):
            self._model.set_submodule(name, layer.train(module.training))

    def remove(self) -> None:
        """Puts the model's own modules back."""
        for name, module in zip(self._loaded.layout.modules, self._before, strict=True):
            self._model.set_submodule(name, module)

    def skipped(
        self, tokens: TokenBatch, decoder: TokenBatch | None, read_B: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Padding behind the last token; see `Adapter.skipped`."""
        blank_B = read_B & ~tokens.mask.any(1)  # attention over nothing but padding reads all of it
        skipped_BT = ~(needed_positions(tokens.mask) | blank_B[:, None])
        return skipped_BT.reshape(-1), None if decoder is None else ~needed_positions(decoder.mask).reshape(-1)

    def step_needs(self, input_ids: Tensor, attention_mask: Any) -> Tensor | None:
        """All positions: a decoder is fed no padding."""


class RegisteredAdapter:
    """Sets the experts implementation of a decoder-only model.

    Args:
        loaded: The model.

    Raises:
        ValueError: If something else spreads the model's experts over devices.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded, self._model, layout = loaded, loaded.model, loaded.layout
        modules: list[Any] = [loaded.model.get_submodule(name) for name in layout.modules]
        if any(module._is_expert_parallel for module in modules):
            raise ValueError(
                f"{layout.model_id} was loaded with expert parallelism of transformers; load it without a distributed "
                "configuration"
            )
        form = ExpertFormat.of(loaded.model, layout)
        self.functions = [
            ExpertFunction(form, module._apply_gate if form.gated else module.act_fn) for module in modules
        ]
        self._modules: list[nn.Module] = modules
        dtype = modules[0].get_parameter(form.names[0]).dtype
        self.like: Tensor = loaded.model.get_input_embeddings().weight.detach().new_empty(1, dtype=dtype)
        self.stepper: nn.Module = loaded.model
        self.step_layers = slice(None)
        self._attends_only = attends_only(loaded.model)
        self._before: dict[str, str | None] = loaded.model.get_experts_implementation()

    def weights(self) -> ExpertSource:
        """The live model's experts."""
        return StackedWeights(self._model, self._loaded.layout)

    def installed(self) -> bool:
        """Whether an engine runs the model."""
        return any(connected(module) for module in self._modules)

    def install(self, layers: Sequence[ReplicatedExperts]) -> None:
        """Sets the experts implementation."""
        connect(self._modules, list(layers))
        self._model.set_experts_implementation(NAME)

    def remove(self) -> None:
        """Sets the experts implementation that the model had."""
        self._model.set_experts_implementation(self._before)
        disconnect(self._modules)

    def skipped(
        self, tokens: TokenBatch, decoder: TokenBatch | None, read_B: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Padding, which attention masks; where a layer's state may read it, only sequences of padding alone."""
        needed_BT = tokens.mask if self._attends_only else tokens.mask.any(1, keepdim=True).expand(tokens.mask.shape)
        return None if needed_BT.all() else ~needed_BT.reshape(-1), None

    def step_needs(self, input_ids: Tensor, attention_mask: Any) -> Tensor | None:
        """Real tokens, and the last position, whose logits are read; see `Adapter.step_needs`."""
        width = input_ids.shape[1]
        plain = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and attention_mask.shape[1] >= width
        if width == 1 or not plain or not self._attends_only:
            return None
        needed = attention_mask[:, -width:] != 0
        return torch.cat([needed[:, :-1], torch.ones_like(needed[:, -1:])], 1)
