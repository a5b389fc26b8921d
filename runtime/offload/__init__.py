"""Experts that do not fit in memory: an expert cache over tiers of buffers, its eviction policy, and prefetch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.offload.cache import ExpertCache as ExpertCache
    from runtime.offload.policy import Policy as Policy
    from runtime.offload.slots import MemoryBudget as MemoryBudget

_HOME = {"ExpertCache": ".cache", "MemoryBudget": ".slots", "Policy": ".policy"}
__all__ = ["ExpertCache", "MemoryBudget", "Policy"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __package__), name)
