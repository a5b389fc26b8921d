"""Runs a model with replicated experts: load, run, generate; the controller works one batch ahead."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.engine.batch import BatchOutput as BatchOutput
    from runtime.engine.batch import BatchStats as BatchStats
    from runtime.engine.batch import ModelBatch as ModelBatch
    from runtime.engine.engine import Engine as Engine

__all__ = [
    "BatchOutput",
    "BatchStats",
    "Engine",
    "ModelBatch",
]
_MODULES = {
    "BatchOutput": ".batch",
    "BatchStats": ".batch",
    "Engine": ".engine",
    "ModelBatch": ".batch",
}


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, so that importing the package costs nothing."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __package__), name)
