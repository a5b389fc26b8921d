"""LinearProbe: names the expert that a later MoE layer's router will choose, from a hidden state; learns while it runs.

One linear map and a softmax, fitted online by Adam (Kingma and Ba, arXiv 1412.6980) on the cross-entropy of the experts
that the router chose. Its weights need D x E numbers, and a step for some tokens costs about as much as their router.

Shape suffixes: T tokens, D features, E logical experts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

RATE = 0.5
"""Step size of Adam times the number of features, of which each one adds as much to a step: chosen on the bundled
model's validation batches, where .0039 for 128 features and .002 for 256 are near the best."""
MOMENTUM, SQUARES = 0.9, 0.99
"""Retention (0 to 1) of Adam's two averages from one step to the next."""
EPSILON = 1e-8
MOST_STEPS = 10**12


class LinearProbe:
    """A softmax regression on hidden states.

    Args:
        width: D, features of a token.
        num_experts: E.
        device: Where hidden states lie.

    Attributes:
        steps: Steps it has learned.
    """

    def __init__(self, width: int, num_experts: int, device: torch.device) -> None:
        self.num_experts, self._rate = num_experts, RATE / width
        self._weight_DE = torch.zeros(width + 1, num_experts, device=device)  # the last row is the bias
        self._mean_DE, self._square_DE = torch.zeros_like(self._weight_DE), torch.zeros_like(self._weight_DE)
        self.steps = 0

    def state(self) -> dict[str, Tensor]:
        """Weights and squares of gradients as bfloat16 `[D + 1, E]`, and steps `[1]`: what a later run begins with."""
        return {
            "weight": self._weight_DE.bfloat16(), "square": self._square_DE.bfloat16(),
            "steps": torch.tensor([self.steps], device=self._weight_DE.device),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a `state`.

        Raises:
            ValueError: If it is of another width or number of experts, or holds numbers that are not finite.
        """
        for name, held in (("weight", self._weight_DE), ("square", self._square_DE)):
            if name not in state or state[name].shape != held.shape or not state[name].isfinite().all():
                found = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(f"{name} is {found}, expected finite numbers {tuple(held.shape)}")
            held.copy_(state[name])
        if "steps" not in state or state["steps"].shape != (1,) or not 0 <= state["steps"] <= MOST_STEPS:
            raise ValueError(f"steps is {state.get('steps', 'missing')}, expected one number from 0 to {MOST_STEPS}")
        self.steps = int(state["steps"])

    def probability(self, feature_TD: Tensor) -> Tensor:
        """Probability of each expert, `[T, E]`; uniform before the first step."""
        return torch.addmm(self._weight_DE[-1], feature_TD, self._weight_DE[:-1]).softmax(-1)

    def learn(self, feature_TD: Tensor, probability_TE: Tensor, target_TE: Tensor) -> None:
        """One step towards the experts that a router chose.

        Args:
            feature_TD: Features of some tokens.
            probability_TE: What `probability` says of them.
            target_TE: Share of each expert among those that the router chose for the token: rows that sum to 1, or 0
                for a token that has no part in the step.
        """
        error_TE = probability_TE * target_TE.sum(-1, keepdim=True) - target_TE
        gradient_DE = torch.cat([feature_TD.T @ error_TE, error_TE.sum(0, keepdim=True)]) / max(len(feature_TD), 1)
        self.steps += 1
        self._mean_DE.lerp_(gradient_DE, 1 - MOMENTUM)
        self._square_DE.lerp_(gradient_DE.square(), 1 - SQUARES)
        scale_DE = (self._square_DE / (1 - SQUARES**self.steps)).sqrt_().add_(EPSILON)
        self._weight_DE.addcdiv_(self._mean_DE, scale_DE, value=-self._rate / (1 - MOMENTUM**self.steps))


def normalised(hidden_TD: Tensor) -> Tensor:
    """Hidden states as float32 rows with root mean square 1."""
    hidden_TD = hidden_TD.float()
    return hidden_TD * torch.rsqrt(hidden_TD.square().mean(-1, keepdim=True) + 1e-6)
