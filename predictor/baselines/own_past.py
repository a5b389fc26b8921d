"""OwnPast: each request's own past loads, shrunk towards the moving average; needs batches that name their requests.

Shape suffixes: B sequences, L MoE layers, E logical experts.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from data.arrays import FloatArray, IntArray
from data.traces.loads import share_of
from predictor.baselines.history import Ema
from predictor.forecast import LoadForecast, LoadHistory, forecast_from_load

if TYPE_CHECKING:  # it imports torch
    from data.traces.trace import TokenBatch

STRENGTH = 96.0
"""Assignments that the average counts as, beside those of a request."""
RECENT = 0.1
"""Weight of the newest forecast's squared error in the running mean that the spread is taken from."""


class OwnPast:
    """Sums, over the coming batch's sequences, what each one's request did so far; new requests get the average.

    The length of the history is the number of the coming batch. Requests are forgotten when a batch is without them.

    Args:
        sequences: Loads of each sequence of each batch, `[N][B, L, E]`; those of batches still to come are not read.
        requests: Request of each sequence, `[N][B]`.
        top_k: Experts of a token.
    """

    name = "own"

    def __init__(self, sequences: list[IntArray], requests: list[IntArray], top_k: int, ema: Ema = Ema()) -> None:
        self.sequences, self.requests, self.top_k, self.ema = sequences, requests, top_k, ema
        self._seen = 0
        self._past: dict[int, FloatArray] = {}
        self._made: tuple[int, FloatArray] | None = None
        self._error: FloatArray | None = None

    def forecast(self, upcoming: "TokenBatch | None", history: LoadHistory) -> LoadForecast:
        average = self.ema.forecast(upcoming, history)
        self._observe(len(history))
        if upcoming is None or upcoming.requests is None:
            return replace(average, source=self.name)
        tokens = upcoming.computed.sum(1).numpy()
        load = np.zeros_like(average.share)
        for request, count in zip(upcoming.requests.tolist(), tokens, strict=True):
            past = self._past.get(request)
            weighted = STRENGTH * average.share + (0 if past is None else past)
            load += count * self.top_k * share_of(weighted)
        forecast = forecast_from_load(load, made_at=len(history), source=self.name)
        self._made = len(history), forecast.share
        return replace(forecast, spread=average.spread if self._error is None else np.sqrt(self._error))

    def _observe(self, step: int) -> None:
        """Adds the batches before `step` to the requests' past, and the error of the newest forecast to the spread."""
        for number in range(self._seen, step):
            loads = dict(zip(self.requests[number].tolist(), self.sequences[number], strict=True))
            self._past = {request: self._past.get(request, 0.0) + load for request, load in loads.items()}
            if self._made is not None and self._made[0] == number:
                square = (self._made[1] - share_of(self.sequences[number].sum(0))) ** 2
                self._error = square if self._error is None else (1 - RECENT) * self._error + RECENT * square
        self._seen = step
