"""Our placement with few moves as a policy of vLLM's own balancer; vLLM is imported only to register it.

    from switchcast.runtime.export.vllm_policy import register
    register()    # in every process of vLLM, before the model is loaded: docs/export.md says how
    register(record="loads.jsonl")    # the same, and rank 0 appends the loads that it places for: `switchcast export -`

Shape suffixes: L MoE layers, E logical experts, P slots.
"""

import json
import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from data.arrays import FloatArray
from runtime.balancing.few_moves import rebalance

log = logging.getLogger(__name__)


class FewMovesPolicy:
    """Has the method of vLLM's `AbstractEplbPolicy`, so that it can be used without being a subclass."""

    record: ClassVar[Path | None] = None
    """File to which rank 0 appends each load, a line of JSON; None for none."""

    @classmethod
    def rebalance_experts(
        cls,
        weight: Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: Tensor | None = None,
    ) -> Tensor:
        """The expert in each slot, int64 `[L, P]`, on the CPU.

        Args:
            weight: Load of each expert, `[L, E]`.
            num_replicas: P.
            num_groups: Groups that the router chooses experts by.
            num_nodes: Nodes; where they divide the groups, experts move within their node only.
            num_ranks: Devices.
            old_global_expert_indices: Expert in each slot now, `[L, P]`, -1 where a slot is empty. Another number of
                slots, as after a change of the number of ranks, is placed anew.

        Raises:
            ValueError: If the weights are not loads `[L, E]`, or the numbers do not divide.
        """
        current = None
        if old_global_expert_indices is not None and old_global_expert_indices.shape == (len(weight), num_replicas):
            current = old_global_expert_indices.cpu().numpy()
        load = weight.detach().cpu().double().numpy()
        if cls.record is not None:
            _append(load, cls.record)
        return torch.from_numpy(rebalance(load, num_replicas, num_ranks, current, num_groups, num_nodes))


def _append(load_LE: FloatArray, path: Path) -> None:
    """Appends a load, unless it has no tokens; an engine that serves does not stop where that fails."""
    if not load_LE.any() or (torch.distributed.is_initialized() and torch.distributed.get_rank() > 0):
        return
    try:
        with path.open("a") as file:
            file.write(json.dumps(load_LE.round().astype(int).tolist()) + "\n")
    except OSError as error:
        log.warning("loads are not recorded: %s", error)


def register(name: str = "default", record: Path | str | None = None) -> Any:
    """Makes it the policy that vLLM uses under a name, as a subclass of vLLM's own; returns that class.

    Args:
        name: vLLM's asynchronous balancing takes "default" alone.
        record: File to which rank 0 appends the loads that it places for, one line for each of vLLM's windows.
    """
    from vllm.distributed.eplb.policy import EPLB_POLICIES, AbstractEplbPolicy  # not a dependency of ours

    members = {"record": None if record is None else Path(record)}
    EPLB_POLICIES[name] = type("SwitchcastEplbPolicy", (FewMovesPolicy, AbstractEplbPolicy), members)
    return EPLB_POLICIES[name]
