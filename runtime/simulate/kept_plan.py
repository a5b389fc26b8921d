"""What plans give that stay for many steps, in engines that split an expert's tokens evenly over its copies.

So work SGLang, vLLM, TensorRT-LLM and vllm-ascend: they read a plan when they start, or place experts anew every so
many steps. Experts lie at home in the first quarter of the replayed steps; the plan is made from these steps, and
judged on the rest. A later plan is made from all steps before it; its moves and its making delay the step, in full.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from predictor.forecast import LoadForecast, LoadHistory
from runtime.balancing.eplb import EplbPlanner
from runtime.balancing.few_moves import FewMovesPlanner
from runtime.balancing.plan import ReplicationPlan
from runtime.balancing.planner import Planner
from runtime.simulate.cost_model import DeviceTimes
from runtime.simulate.outcome import Outcome
from runtime.simulate.verdict import judged, memory_of

MADE_FROM = 4
"""The first plan is made from one of so many parts of the steps."""


@dataclass
class KeptPlan:
    """Keeps each plan of a planner for many steps.

    Args:
        planner: Makes the plans.
        first: Steps before the first plan.
        every: Steps between plans; None keeps the first.
    """

    planner: Planner
    first: int
    every: int | None = None
    _step: int = 0

    def plan(self, forecast: LoadForecast, current: ReplicationPlan, recent: LoadHistory) -> ReplicationPlan:
        """See `runtime.balancing.planner.Planner`."""
        since = self._step - self.first
        self._step += 1
        if since < 0 or (since and (self.every is None or since % self.every)):
            return current
        return self.planner.plan(forecast, current, recent)


def kept_plans(
    steps: int, home: ReplicationPlan, renew_every: int, num_groups: int = 1, num_nodes: int = 1
) -> dict[str, tuple[Planner, ReplicationPlan]]:
    """Plans that are kept, and plans that are renewed: with few moves, as `switchcast export` and our policy class for
    vLLM place experts, and by EPLB, as the engines do themselves.

    Args:
        steps: Steps that are replayed.
        home: The plan before the first step.
        renew_every: Steps between the renewed plans, which are left out where there would be one.
        num_groups: Groups of experts that stay on one node, a multiple of the nodes.
        num_nodes: Nodes.
    """
    groups = num_groups, num_nodes
    first = steps // MADE_FROM
    ways = {"kept": None} | ({"renewed": renew_every} if renew_every < steps - first else {})
    return {
        f"{way}, {name}": (KeptPlan(planner, first, every), home)
        for way, every in ways.items()
        for name, planner in (("few moves", FewMovesPlanner(*groups)), ("eplb", EplbPlanner(*groups)))
    }


def in_engines(contiguous: Outcome, outcomes: list[Outcome], times: DeviceTimes, renew_every: int) -> dict[str, Any]:
    """What each kept plan saves.

    Args:
        contiguous: The policy without replicas.
        outcomes: Outcomes of `kept_plans`.
        times: What steps cost.
        renew_every: Steps between the renewed plans.

    Returns:
        JSON document: `made_from`, `judged_on` (numbers of steps), `renew_every`, and `plans`, for each its way (kept
        or renewed), planner, what `verdict.judged` says, balancedness, and moves a layer and step.
    """
    first = contiguous.num_steps // MADE_FROM
    without, plans = contiguous.seconds[first:], []
    for item in outcomes:
        added = item.move_seconds + 1e-3 * item.plan_ms
        net = item.seconds[first:] + np.concatenate([[0.0], added[first + 1 :]])  # the first plan is there at the start
        way, _, planner = item.planner.partition(", ")
        moves = item.arrivals[first + 1 :].sum() / len(without) / item.shape[0]
        plans.append(
            {"way": way, "planner": planner}
            | judged(without, (net, net, net), memory_of(item, times), times)
            | {"balancedness": round(item.balancedness_from(first), 5), "moves_per_layer": round(float(moves), 4)}
        )
    return {"made_from": first, "judged_on": len(without), "renew_every": renew_every, "plans": plans}
