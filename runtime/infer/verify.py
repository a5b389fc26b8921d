"""Verifier: compares each batch with the plain model, and its balance with the last batch's and the oracle's plan.

In float32 outputs are equal up to the last bits of a logit. In bfloat16 the order of additions matters more: a router
may choose another of two nearly equal experts, which changes the token's logits. There, differing routes and likeliest
tokens are counted.
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from data.traces.router_tap import RouterTap
from predictor.baselines.history import LastBatch
from predictor.forecast import forecast_from_load
from runtime.balancing.split import mean_balancedness, split_load
from runtime.engine.batch import BatchOutput, ModelBatch, forward
from runtime.engine.engine import Engine
from runtime.telemetry.recorder import forecast_error


@dataclass(frozen=True)
class BatchCheck:
    """One batch beside the plain model and the oracle.

    Attributes:
        tokens: Real tokens, decoder included.
        logit_difference: Largest absolute difference from the plain model's logits on real tokens, over all ranks;
            None where it was not compared.
        same_argmax: Share of real tokens whose likeliest output token is the plain model's; None likewise.
        differing_tokens: Number of real tokens whose likeliest output token is not the plain model's; None likewise.
        routes: Routes that were compared: K for each real token and MoE layer; 0 in float32.
        flipped_routes: Number of these for which the plain model's router chose another expert.
        contiguous: Balancedness without replicas, experts in their own order.
        replicated: Balancedness as it ran.
        last: Balancedness of the same planner, given the load of the batch before.
        oracle: The same, given the true load.
        load_tv: Total variation distance of the forecast; None where there was no forecast.
        phase: Which traffic it belongs to.
    """

    tokens: int
    logit_difference: float | None
    same_argmax: float | None
    differing_tokens: int | None
    routes: int
    flipped_routes: int
    contiguous: float
    replicated: float
    last: float
    oracle: float
    load_tv: float | None
    phase: str


class Comparison(NamedTuple):
    """A batch beside the plain model; see `BatchCheck`."""

    logit_difference: float | None
    same_argmax: float | None
    differing_tokens: int | None
    routes: int
    flipped_routes: int


class Verifier:
    """Compares outputs with the plain model's and with plans from the last load and the true load; a context.

    Args:
        engine: What ran; all ranks check in step.
        plain: The plain model in the same dtype, whole on each rank; None leaves outputs unchecked.
    """

    def __init__(self, engine: Engine, plain: Any) -> None:
        self.engine, self._plain = engine, plain
        self._last_plan = self._plan = engine.home
        self._taps: list[RouterTap] = []
        if plain is not None and plain.dtype != torch.float32:
            self._taps = [RouterTap(model, engine.loaded.layout) for model in (engine.loaded.model, plain)]

    def __enter__(self) -> Self:
        for tap in self._taps:
            tap.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tap in self._taps:
            tap.__exit__(kind, error, trace)

    def check(self, batch: ModelBatch, output: BatchOutput, phase: str) -> BatchCheck:
        """Runs the plain model on the whole batch: in halves it differs from itself in last bits; see `BatchCheck`."""
        found = Comparison(None, None, None, 0, 0) if self._plain is None else self._compare(batch, output)
        truth = forecast_from_load(output.stats.load.astype(np.float64), made_at=0, source="oracle")
        history = self.engine.controller.history
        self._plan = self.engine.planner.plan(truth, self._plan, history)
        if len(before := history[:-1]):  # the engine has observed this batch already
            last = LastBatch().forecast(None, before)
            self._last_plan = self.engine.planner.plan(last, self._last_plan, before)
        return BatchCheck(
            tokens=batch.tokens.num_tokens + (batch.decoder.num_tokens if batch.decoder else 0),
            **found._asdict(),
            contiguous=mean_balancedness(split_load(output.stats.load, self.engine.home)),
            replicated=mean_balancedness(output.stats.device_load),
            last=mean_balancedness(split_load(output.stats.load, self._last_plan)),
            oracle=mean_balancedness(split_load(output.stats.load, self._plan)),
            load_tv=None if (errors := forecast_error(output.stats)) is None else float(np.nanmean(errors)),
            phase=phase,
        )

    def _compare(self, batch: ModelBatch, output: BatchOutput) -> Comparison:
        real = (batch.decoder or batch.tokens).mask[output.rows].to(output.logits.device)
        found = torch.zeros(5, dtype=torch.float64)  # largest difference, tokens alike, tokens, flipped routes, routes
        plain = forward(self._plain, batch)[output.rows]
        if real.any():  # else this rank had no sequence
            ours, theirs = output.logits[real], plain[real]
            found[0] = (ours - theirs).abs().max()
            found[1], found[2] = (ours.argmax(-1) == theirs.argmax(-1)).sum(), len(ours)
        found[3], found[4] = self._compare_routes(batch, output.rows)
        everyone = self.engine.ranks.gather(found)
        if not everyone.isfinite().all():
            raise ValueError(f"logits of {self.engine.loaded.layout.model_id} are not finite; its weights are damaged")
        _, alike, tokens, flipped, routes = everyone.sum(0).tolist()
        return Comparison(
            float(everyone[:, 0].max()),
            alike / tokens,
            int(tokens - alike),
            routes=int(routes),
            flipped_routes=int(flipped),
        )

    def _compare_routes(self, batch: ModelBatch, rows: slice) -> tuple[int, int]:
        """Real tokens of this rank's sequences that the plain model's routers sent elsewhere, and all, over layers."""
        flipped = routes = 0
        if not self._taps:
            return flipped, routes
        ours, theirs = (tap.take() for tap in self._taps)
        for layer, (called, plain) in enumerate(zip(ours, theirs, strict=True)):
            encoder = layer < self.engine.loaded.layout.num_input_layers
            tokens = batch.tokens if encoder else batch.decoder
            if tokens is None or not called:
                continue
            mask = tokens.mask[rows].to(called[0].experts.device)
            width, k = mask.shape[1], self.engine.loaded.layout.experts_per_token
            # [sequences, positions, K], in which a token's experts have no order
            chosen, expected = (call[0].experts.reshape(-1, width, k).sort(-1).values for call in (called, plain))
            differ = (chosen[: len(mask)] != expected[rows]) & mask[:, :, None]
            flipped, routes = flipped + int(differ.sum()), routes + k * int(mask.sum())
        return flipped, routes
