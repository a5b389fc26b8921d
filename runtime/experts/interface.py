"""The experts function "switchcast" of transformers' experts interface: it computes with the slots of an open engine.

transformers calls it in place of a family's own loop over experts, once `set_experts_implementation("switchcast")` has
been called on the model; no module is replaced.
"""

from typing import Any

from torch import Tensor, nn

from runtime.experts.layer import ReplicatedExperts

NAME = "switchcast"
_layers: dict[Any, ReplicatedExperts] = {}


def switchcast_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of each token's experts, `[T, D]`; names of arguments and shapes are transformers'.

    A model that was built from the same configuration object as one in an engine has its implementation set along with
    it, such as the assistant of assisted decoding; it computes by its family's own loop.

    Raises:
        RuntimeError: If no engine runs the model.
    """
    if self not in _layers:
        if any(module.config is self.config for module in _layers):
            combined: Tensor = type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
            return combined
        raise RuntimeError(
            f'the experts of this model compute with "{NAME}", and no engine runs it; call it inside `with Engine('
            'model)`, or model.set_experts_implementation("grouped_mm") first'
        )
    return _layers[self].compute(hidden_states, top_k_index, top_k_weights, self.training)


def connected(module: Any) -> bool:
    """Whether an engine runs an experts module, or a model that shares its configuration object."""
    return any(module is other or module.config is other.config for other in _layers)


def connect(modules: list[nn.Module], layers: list[ReplicatedExperts]) -> None:
    """Has experts modules compute with slots, once their model's experts implementation is set to `NAME`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, switchcast_experts)
    _layers.update(zip(modules, layers, strict=True))


def disconnect(modules: list[nn.Module]) -> None:
    """Undoes `connect`."""
    for module in modules:
        _layers.pop(module, None)
