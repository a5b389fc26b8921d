"""Experts modules of transformers that compute with a registered function, and the routers beside them.

transformers' experts interface (`integrations/moe.py`) gives all families that use it one contract: the experts module
calls `fn(self, hidden_states [T, D], top_k_index [T, K], top_k_weights [T, K]) -> [T, D]`.

Shape suffixes: T tokens, K experts of a token, E experts, D model width, F inner width of an expert.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from data.models.layout import MoELayout, digest_of, digest_of_dense

MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""Attributes that transformers' `use_experts_implementation` gives every experts module."""
TOP_K_NAMES = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "moe_topk")
"""Names under which routers, blocks and configurations keep the number of experts of a token."""

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Entries of a configuration's `layer_types` that are softmax attention over masked positions."""


@dataclass(frozen=True)
class MoEModule:
    """One MoE layer of a live model.

    Attributes:
        name: Module path of its experts.
        experts: The experts module.
        block: Its parent, which calls the router and then the experts.
        number: Number of the model's layer that contains it; dense layers count.
    """

    name: str
    experts: Any
    block: nn.Module
    number: int

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.experts.down_proj.shape[0])

    @property
    def d_ff(self) -> int:
        """Inner width F of an expert."""
        return int(self.experts.down_proj.shape[1 if self.experts.is_transposed else 2])

    def top_k(self, config: Any) -> int:
        """Experts of a token, K: of the router, else of the block, else of the configuration.

        Raises:
            ValueError: If none of them tells it.
        """
        for place in (*self.block.children(), self.block, config):
            for name in TOP_K_NAMES:
                if isinstance(found := getattr(place, name, None), int):
                    return found
        raise ValueError(f"{self.name}: neither its router nor the configuration tells the experts of a token")

    @property
    def shared_parameters(self) -> int:
        """Parameters of shared experts, which compute every token beside the routed experts; no plan moves them."""
        named = self.block.named_parameters()
        return sum(parameter.numel() for name, parameter in named if "shared" in name)

    def routing_tensors(self) -> list[Tensor]:
        """Parameters and buffers beside the experts with a row or an entry for each expert: what decides routes."""
        found = [*self.block.named_parameters(), *self.block.named_buffers()]
        own = {id(tensor) for tensor in self.experts.parameters()}
        return [
            tensor.detach()
            for name, tensor in sorted(found, key=lambda item: item[0])
            if id(tensor) not in own and "shared" not in name and tensor.shape[:1] == (self.num_experts,)
        ]


def attends_only(model: Any) -> bool:
    """Whether positions see each other through masked attention alone, so that nothing reads padding.

    False for layers with a state or a convolution over positions (Jamba, Qwen3-Next, LFM2 ...), and where in doubt.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    if kinds and not set(kinds) <= ATTENTION:
        return False
    layers = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    return bool(layers) and all(_is_attention(type(layer).__name__) for layer in layers)


def _is_attention(name: str) -> bool:
    """Whether modules of a class with this name are softmax attention, or layers around it."""
    stateful = any(mark in name for mark in ("Lightning", "Linear", "Delta", "Mamba", "Conv", "Recurrent"))
    return name.endswith(("Attention", "DecoderLayer", "Gate")) and not stateful


def moe_modules(model: nn.Module) -> list[MoEModule]:
    """The MoE layers of a live model with the experts interface, in order; empty if it has none."""
    found = []
    for name, module in model.named_modules():
        if all(hasattr(module, mark) for mark in MARKS):
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            block = model.get_submodule(name.rpartition(".")[0])
            found.append(MoEModule(name, module, block, numbers[0] if numbers else 0))
    return found


def registered_layout(model: nn.Module, model_id: str, revision: str = "") -> MoELayout:
    """Reads the layout of a live decoder-only model with the experts interface.

    Raises:
        ValueError: If it has no such experts, or its MoE layers differ in size.
    """
    whole: Any = model.config
    config, layers = whole.get_text_config(), moe_modules(model)
    if not layers:
        raise ValueError(f"{model_id} is a {whole.model_type} model without experts that Switchcast can run")
    sizes = {(layer.num_experts, layer.top_k(config), layer.d_ff) for layer in layers}
    if len(sizes) > 1:
        raise ValueError(f"{model_id} has MoE layers of different sizes (experts, top-k, width): {sorted(sizes)}")
    num_experts, top_k, d_ff = sizes.pop()
    modules = tuple(layer.name for layer in layers)
    return MoELayout(
        model_id=model_id, revision=revision, layers=tuple(("decoder", layer.number) for layer in layers),
        num_experts=num_experts, expert_capacity=None, d_model=config.hidden_size, d_ff=d_ff,
        vocab_size=config.vocab_size,
        routers=digest_of([tensor for layer in layers for tensor in layer.routing_tensors()]),
        family=whole.model_type, experts_per_token=top_k, causal=True, modules=modules,
        dense=digest_of_dense(model, modules),
    )  # fmt: skip
