"""Runs Mixture-of-Experts models with replicated experts. docs/architecture.md shows the rooms of this package."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.balancing.balancer import Balancer as Balancer
    from runtime.balancing.eplb import rebalance_experts as rebalance_experts
    from runtime.balancing.plan import ReplicationPlan as ReplicationPlan
    from runtime.balancing.plan import SlotMove as SlotMove
    from runtime.balancing.plan_file import load_plan as load_plan
    from runtime.balancing.plan_file import save_plan as save_plan
    from runtime.balancing.split import balancedness as balancedness
    from runtime.balancing.split import split_by_quota as split_by_quota
    from runtime.engine.batch import BatchOutput as BatchOutput
    from runtime.engine.batch import BatchStats as BatchStats
    from runtime.engine.batch import ModelBatch as ModelBatch
    from runtime.engine.engine import Engine as Engine
    from runtime.export.check import check_plan as check_plan
    from runtime.export.export import export_plan as export_plan

__all__ = [
    "Balancer",
    "BatchOutput",
    "BatchStats",
    "Engine",
    "ModelBatch",
    "ReplicationPlan",
    "SlotMove",
    "balancedness",
    "check_plan",
    "export_plan",
    "load_plan",
    "rebalance_experts",
    "save_plan",
    "split_by_quota",
]
_MODULES = {
    "Balancer": ".balancing.balancer",
    "BatchOutput": ".engine.batch",
    "BatchStats": ".engine.batch",
    "Engine": ".engine.engine",
    "ModelBatch": ".engine.batch",
    "ReplicationPlan": ".balancing.plan",
    "SlotMove": ".balancing.plan",
    "balancedness": ".balancing.split",
    "check_plan": ".export.check",
    "export_plan": ".export.export",
    "load_plan": ".balancing.plan_file",
    "rebalance_experts": ".balancing.eplb",
    "save_plan": ".balancing.plan_file",
    "split_by_quota": ".balancing.split",
}


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, so that importing the package costs nothing."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __package__), name)
