"""Our placement with few moves as a policy of vLLM's own balancer; vLLM is imported only to register it.

    from switchcast.runtime.export.vllm_policy import register
    register()    # in every process of vLLM, before the model is loaded: docs/export.md says how

Shape suffixes: L MoE layers, E logical experts, P slots.
"""

from typing import Any

import torch
from torch import Tensor

from runtime.balancing.few_moves import rebalance


class FewMovesPolicy:
    """Has the method of vLLM's `AbstractEplbPolicy`, so that it can be used without being a subclass."""

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
        return torch.from_numpy(rebalance(load, num_replicas, num_ranks, current, num_groups, num_nodes))


def register(name: str = "default") -> Any:
    """Makes it the policy that vLLM uses under a name, as a subclass of vLLM's own; returns that class.

    vLLM's asynchronous balancing takes the name "default" alone.
    """
    from vllm.distributed.eplb.policy import EPLB_POLICIES, AbstractEplbPolicy  # not a dependency of ours

    EPLB_POLICIES[name] = type("SwitchcastEplbPolicy", (FewMovesPolicy, AbstractEplbPolicy), {})
    return EPLB_POLICIES[name]
