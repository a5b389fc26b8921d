"""Switchcast: forecasts expert load in Mixture-of-Experts models and replicates hot experts before the batch arrives.

All public names in one place, and the console command `switchcast` (see `switchcast --help`).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data import MoELayout as MoELayout
    from data import RouterTap as RouterTap
    from data import TokenBatch as TokenBatch
    from data import open_trace as open_trace
    from predictor import Ema as Ema
    from predictor import Forecaster as Forecaster
    from predictor import LastBatch as LastBatch
    from predictor import LoadForecast as LoadForecast
    from predictor import load_predictor as load_predictor
    from runtime import Balancer as Balancer
    from runtime import BatchOutput as BatchOutput
    from runtime import BatchStats as BatchStats
    from runtime import Engine as Engine
    from runtime import ModelBatch as ModelBatch
    from runtime import ReplicationPlan as ReplicationPlan
    from runtime import SlotMove as SlotMove
    from runtime import balancedness as balancedness
    from runtime import check_plan as check_plan
    from runtime import export_plan as export_plan
    from runtime import load_plan as load_plan
    from runtime import rebalance_experts as rebalance_experts
    from runtime import save_plan as save_plan
    from runtime import split_by_quota as split_by_quota

__all__ = [
    "Balancer",
    "BatchOutput",
    "BatchStats",
    "Ema",
    "Engine",
    "Forecaster",
    "LastBatch",
    "LoadForecast",
    "MoELayout",
    "ModelBatch",
    "ReplicationPlan",
    "RouterTap",
    "SlotMove",
    "TokenBatch",
    "balancedness",
    "check_plan",
    "export_plan",
    "load_plan",
    "load_predictor",
    "open_trace",
    "rebalance_experts",
    "save_plan",
    "split_by_quota",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, so that importing the package costs nothing."""
    if name in __all__:
        import data
        import predictor
        import runtime

        for package in (runtime, predictor, data):
            if name in package.__all__:
                return getattr(package, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
