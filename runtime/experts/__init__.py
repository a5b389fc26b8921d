"""The MoE layer with replicated experts: slots and their weights, token dispatch, grouped GEMM, weight transfer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .layer import ReplicatedExperts as ReplicatedExperts

_HOME = {"ReplicatedExperts": ".layer"}
__all__ = ["ReplicatedExperts"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __package__), name)
