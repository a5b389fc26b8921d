"""Verifier: compares each batch with the plain model, and its balance with the last batch's and the oracle's plan."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.arrays import IntArray
from predictor.baselines.history import LastBatch
from predictor.forecast import forecast_from_load
from runtime.balancing.split import balancedness, split_load
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
    contiguous: float
    replicated: float
    last: float
    oracle: float
    load_tv: float | None
    phase: str


class Verifier:
    """Compares outputs with the plain model's and with plans from the last load and the true load.

    Args:
        engine: What ran; all ranks check in step.
        plain: The plain model, whole on each rank; None leaves answers unchecked.
    """

    def __init__(self, engine: Engine, plain: Any) -> None:
        self.engine, self._plain = engine, plain
        self._last_plan = self._plan = engine.home

    def check(self, batch: ModelBatch, output: BatchOutput, phase: str) -> BatchCheck:
        """Runs the plain model on the whole batch: in halves it differs from itself in last bits; see `BatchCheck`."""
        difference, same = (None, None) if self._plain is None else self._compare(batch, output)
        truth = forecast_from_load(output.stats.load.astype(np.float64), made_at=0, source="oracle")
        history = self.engine.controller.history
        self._plan = self.engine.planner.plan(truth, self._plan, history)
        if len(before := history[:-1]):  # the engine has observed this batch already
            last = LastBatch().forecast(None, before)
            self._last_plan = self.engine.planner.plan(last, self._last_plan, before)
        return BatchCheck(
            tokens=batch.tokens.num_tokens + (batch.decoder.num_tokens if batch.decoder else 0),
            logit_difference=difference,
            same_argmax=same,
            contiguous=_mean_balance(split_load(output.stats.load, self.engine.home)),
            replicated=_mean_balance(output.stats.device_load),
            last=_mean_balance(split_load(output.stats.load, self._last_plan)),
            oracle=_mean_balance(split_load(output.stats.load, self._plan)),
            load_tv=None if (errors := forecast_error(output.stats)) is None else float(errors.mean()),
            phase=phase,
        )

    def _compare(self, batch: ModelBatch, output: BatchOutput) -> tuple[float, float]:
        real = (batch.decoder or batch.tokens).mask[output.rows].to(output.logits.device)
        found = torch.zeros(3, dtype=torch.float64)  # largest difference, tokens alike, tokens
        if real.any():  # else this rank had no sequence
            ours, theirs = output.logits[real], forward(self._plain, batch)[output.rows][real]
            found[0] = (ours - theirs).abs().max()
            found[1], found[2] = (ours.argmax(-1) == theirs.argmax(-1)).sum(), len(ours)
        everyone = self.engine.ranks.gather(found)
        if not everyone.isfinite().all():
            raise ValueError(f"logits of {self.engine.switch.layout.model_id} are not finite; its weights are damaged")
        return float(everyone[:, 0].max()), float(everyone[:, 1].sum() / everyone[:, 2].sum())


def _mean_balance(device_load_LG: IntArray) -> float:
    return float(balancedness(device_load_LG).mean())
