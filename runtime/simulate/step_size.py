"""Recorded loads at another number of tokens a step than they were recorded with."""

from dataclasses import dataclass, replace

import numpy as np

from data.traces.loads import RecordedLoads


@dataclass(frozen=True)
class StepSize:
    """How large the steps of a recording are.

    Attributes:
        tokens_per_step: Tokens of a step, mean over steps and the layers that got some.
        tokens_per_expert: Tokens of an expert in a step, likewise; a token counts for each of its experts.
        recorded_tokens_per_step: Tokens of a step as it was recorded.
    """

    tokens_per_step: float
    tokens_per_expert: float
    recorded_tokens_per_step: float

    @classmethod
    def of(cls, recorded: RecordedLoads, top_k: int, before: float | None = None) -> "StepSize":
        """Of a recording whose tokens have `top_k` experts each; `before`: its tokens a step before it was scaled."""
        loads = recorded.loads[:, recorded.layers]
        load = float(loads.sum(-1)[loads.any(-1)].mean())
        tokens = round(load / top_k, 2)
        return cls(tokens, round(load / loads.shape[-1], 2), before or tokens)


def at_step_size(recorded: RecordedLoads, tokens: float, top_k: int) -> RecordedLoads:
    """The recording as if its steps had had another number of tokens, on average.

    More tokens: every load is multiplied, so that shares, and with them the skew, stay as recorded; a real step of more
    tokens would be somewhat more even. Fewer tokens: each layer's tokens are drawn from the recorded ones without
    replacement, from a fixed seed, so that a small step is as uneven as small steps are.

    Only counts are kept: forecasts that read tokens or requests cannot be made from the result.

    Args:
        recorded: The recording.
        tokens: Tokens of a step, above 0.
        top_k: Experts of a token.

    Raises:
        ValueError: If `tokens` is not above 0.
    """
    if not 0 < tokens < float("inf"):
        raise ValueError(f"tokens_per_step is {tokens}, expected a finite number above 0")
    factor = tokens / StepSize.of(recorded, top_k).tokens_per_step
    if factor >= 1:
        loads = np.rint(recorded.loads * factor).astype(np.int64)
    else:
        rng = np.random.default_rng(0)
        wanted = np.rint(recorded.loads.sum(-1) * factor).astype(np.int64)
        loads = np.stack(
            [
                [
                    rng.multivariate_hypergeometric(load, count, method="marginals")
                    for load, count in zip(*step, strict=True)
                ]
                for step in zip(recorded.loads, wanted, strict=True)
            ]
        )
    scaled = replace(recorded, loads=loads, batches=None, sequences=None)
    return scaled.with_tokens()
