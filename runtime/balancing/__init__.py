"""Where each expert's copies lie and how its tokens are split over them: plans, planners, splits. No model, no torch.

`Balancer` is the way in; `rebalance_experts` has EPLB's signature.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.balancing.balancer import Balancer as Balancer
    from runtime.balancing.eplb import ContiguousPlanner as ContiguousPlanner
    from runtime.balancing.eplb import EplbPlanner as EplbPlanner
    from runtime.balancing.eplb import rebalance_experts as rebalance_experts
    from runtime.balancing.plan import ReplicationPlan as ReplicationPlan
    from runtime.balancing.plan import SlotMove as SlotMove
    from runtime.balancing.planner import HomePlanner as HomePlanner
    from runtime.balancing.planner import Planner as Planner
    from runtime.balancing.split import balancedness as balancedness
    from runtime.balancing.split import device_load as device_load
    from runtime.balancing.split import split_by_quota as split_by_quota
    from runtime.balancing.split import split_evenly as split_evenly
    from runtime.balancing.split import split_load as split_load

_HOME = {
    "Balancer": ".balancer",
    "ContiguousPlanner": ".eplb",
    "EplbPlanner": ".eplb",
    "HomePlanner": ".planner",
    "Planner": ".planner",
    "ReplicationPlan": ".plan",
    "SlotMove": ".plan",
    "balancedness": ".split",
    "device_load": ".split",
    "rebalance_experts": ".eplb",
    "split_by_quota": ".split",
    "split_evenly": ".split",
    "split_load": ".split",
}
__all__ = [
    "Balancer",
    "ContiguousPlanner",
    "EplbPlanner",
    "HomePlanner",
    "Planner",
    "ReplicationPlan",
    "SlotMove",
    "balancedness",
    "device_load",
    "rebalance_experts",
    "split_by_quota",
    "split_evenly",
    "split_load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __package__), name)
