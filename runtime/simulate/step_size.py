"""Recorded loads at another number of tokens a step than they were recorded with."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from data.traces.load_stream import LoadStream, Step
from data.traces.loads import MOST_TOKENS


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
    def of(cls, stream: LoadStream, top_k: int, before: float | None = None) -> "StepSize":
        """Of a recording whose tokens have `top_k` experts each; `before`: its tokens a step before it was scaled."""
        tokens = round(stream.mean_tokens / top_k, 2)
        return cls(tokens, round(stream.mean_tokens / stream.num_experts, 2), before or tokens)


def at_step_size(stream: LoadStream, tokens: float, top_k: int) -> LoadStream:
    """The recording as if its steps had had another number of tokens, on average.

    More tokens: every load is multiplied, so that shares, and with them the skew, stay as recorded; a real step of more
    tokens would be somewhat more even. Fewer tokens: each layer's tokens are drawn from the recorded ones without
    replacement, from a fixed seed, so that a small step is as uneven as small steps are.

    Only counts are kept: forecasts that read tokens or requests cannot be made from the result.

    Args:
        stream: The recording.
        tokens: Tokens of a step, above 0.
        top_k: Experts of a token.

    Raises:
        ValueError: If `tokens` is not above 0, or larger than counts can be.
    """
    if not 0 < tokens < float("inf"):
        raise ValueError(f"tokens_per_step is {tokens}, expected a finite number above 0")
    factor = tokens / StepSize.of(stream, top_k).tokens_per_step
    if stream.most_tokens * factor > MOST_TOKENS:
        raise ValueError(f"tokens_per_step is {tokens:g}, expected at most {MOST_TOKENS} assignments in any step")
    return LoadStream.read(stream.name, partial(_scaled, stream, factor), stream.empty_steps)


def _scaled(stream: LoadStream, factor: float) -> Iterator[Step]:
    """The steps with their loads scaled; every reading draws the same."""
    rng = np.random.default_rng(0)
    for step in stream.steps():
        if factor >= 1:
            yield Step(np.rint(step.load * factor).astype(np.int64))
            continue
        wanted_L = np.rint(step.load.sum(-1) * factor).astype(np.int64)
        layers = zip(step.load, wanted_L, strict=True)
        yield Step(np.stack([rng.multivariate_hypergeometric(*layer, method="marginals") for layer in layers]))
