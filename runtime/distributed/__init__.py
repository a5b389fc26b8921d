"""Ranks with their process groups and heartbeat, and what differs between CUDA devices and the CPU."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .heartbeat import RankLostError as RankLostError
    from .ranks import Ranks as Ranks

_HOME = {"RankLostError": ".heartbeat", "Ranks": ".ranks"}
__all__ = ["RankLostError", "Ranks"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __package__), name)
