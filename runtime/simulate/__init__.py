"""Replays recorded expert loads through balancing policies and decides whether replication is worth it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.simulate.comparison import compare_policies as compare_policies

__all__ = ["compare_policies"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".comparison", __package__), name)
