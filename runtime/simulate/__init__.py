"""Replays recorded expert loads through balancing policies and decides whether replication is worth it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.simulate.comparison import compare_policies as compare_policies
    from runtime.simulate.gpu_cost import gpu_times

__all__ = ["compare_policies", "gpu_times"]
_MODULES = {"compare_policies": ".comparison", "gpu_times": ".gpu_cost"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __package__), name)
