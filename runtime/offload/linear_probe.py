"""LinearProbe: names the expert that a later MoE layer's router will choose, from a hidden state; learns while it runs.

One linear map and a softmax, fitted online by Adam (Kingma and Ba, arXiv 1412.6980) on the cross-entropy of the experts
that the router chose. Its weights need D x E numbers. A step of Adam reads and writes all of them several times, which
for a few tokens costs much more than their router; so a probe waits until it has `LEAST_TOKENS` to learn from.

Shape suffixes: T tokens, D features, E logical experts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import rms_norm
from torch.optim.adam import adam

RATE = 0.5
"""Step size of Adam times the number of features, of which each one adds as much to a step: chosen on the bundled
model's validation batches, where .0039 for 128 features and .002 for 256 are near the best."""
LEAST_TOKENS = 16
"""Tokens of a step of Adam. On recorded training batches with eight tokens a pass the experts named are as often right
as with a step for every pass; with two, more often (.72 and .70 from layer to layer), for a fifth of the time."""
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
    """

    def __init__(self, width: int, num_experts: int, device: torch.device) -> None:
        self.num_experts, self._rate = num_experts, RATE / width
        self._weight_DE = torch.zeros(width + 1, num_experts, device=device)  # the last row is the bias
        self._mean_DE, self._square_DE = torch.zeros_like(self._weight_DE), torch.zeros_like(self._weight_DE)
        self._steps = torch.zeros((), device=device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # what to learn from, until there is enough

    @property
    def steps(self) -> int:
        """Steps it has learned."""
        return int(self._steps)

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
        held = {"weight": self._weight_DE, "square": self._square_DE}
        for name, tensor in held.items():
            if name not in state or state[name].shape != tensor.shape:
                found = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(f"{name} is {found}, expected finite numbers {tuple(tensor.shape)}")
            if not state[name].isfinite().all() or (name == "square" and (state[name] < 0).any()):
                kind = "finite numbers" + ", 0 or more" * (name == "square")
                raise ValueError(f"{name} holds {state[name].min()} to {state[name].max()}, expected {kind}")
        if "steps" not in state or state["steps"].shape != (1,) or not 0 <= state["steps"] <= MOST_STEPS:
            raise ValueError(f"steps is {state.get('steps', 'missing')}, expected one number from 0 to {MOST_STEPS}")
        for name, tensor in held.items():
            tensor.copy_(state[name])
        self._steps.fill_(int(state["steps"]))
        self._waiting.clear()

    def probability(self, feature_TD: Tensor) -> Tensor:
        """Probability of each expert, `[T, E]`; uniform before the first step."""
        return torch.addmm(self._weight_DE[-1], feature_TD, self._weight_DE[:-1]).softmax(-1)

    def learn(self, feature_TD: Tensor, probability_TE: Tensor, target_TE: Tensor) -> None:
        """Learns which experts a router chose: at once, or with the tokens of the next calls if these are few.

        Args:
            feature_TD: Features of some tokens.
            probability_TE: What `probability` says of them.
            target_TE: Share of each expert among those that the router chose for the token: rows that sum to 1, or 0
                for a token that has no part in the step.
        """
        self._waiting.append((feature_TD, probability_TE, target_TE))
        if sum(len(feature) for feature, _, _ in self._waiting) >= LEAST_TOKENS:
            feature_TD, probability_TE, target_TE = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting.clear()
            self._step(feature_TD, probability_TE, target_TE)

    def _step(self, feature_TD: Tensor, probability_TE: Tensor, target_TE: Tensor) -> None:
        """One step of Adam."""
        error_TE = (probability_TE * target_TE.sum(-1, keepdim=True) - target_TE) / max(len(feature_TD), 1)
        gradient_DE = torch.empty_like(self._weight_DE)
        torch.mm(feature_TD.T, error_TE, out=gradient_DE[:-1])
        torch.sum(error_TE, 0, out=gradient_DE[-1])
        adam(  # in one pass over the weights, which a step of generation finds outside of the processor's cache
            [self._weight_DE], [gradient_DE], [self._mean_DE], [self._square_DE], [], [self._steps], fused=True,
            lr=self._rate, beta1=MOMENTUM, beta2=SQUARES, eps=EPSILON, weight_decay=0, amsgrad=False, maximize=False,
        )  # fmt: skip


def normalised(hidden_TD: Tensor) -> Tensor:
    """Hidden states as float32 rows with root mean square 1."""
    return rms_norm(hidden_TD.float(), hidden_TD.shape[-1:], eps=1e-6)
