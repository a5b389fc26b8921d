"""OwnPast: each request's own past loads, shrunk towards the moving average; needs batches that name their requests.

Shape suffixes: B sequences, L MoE layers, E logical experts.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from data.arrays import FloatArray
from data.traces.loads import share_of
from predictor.baselines.history import Ema
from predictor.forecast import LoadForecast, LoadHistory, Loads, forecast_from_load

if TYPE_CHECKING:  # it imports torch
    from data.traces.trace import TokenBatch

STRENGTH = 96.0
"""Assignments that the average counts as, beside those of a request."""
RECENT = 0.1
"""Weight of the newest forecast's squared error in the running mean that the spread is taken from."""


class OwnPast:
    """Sums, over the coming batch's sequences, what each one's request did so far; new requests get the average.

    Requests are forgotten when a batch is observed without them.

    Args:
        top_k: Experts of a token.
        ema: The average.
    """

    name = "own"

    def __init__(self, top_k: int, ema: Ema = Ema()) -> None:
        self.top_k, self.ema = top_k, ema
        self._row: dict[int, int] = {}
        self._past = np.zeros((0, 0, 0))
        """Loads of each request so far, `[requests, L, E]`; `_row` says which is whose."""
        self._share: FloatArray | None = None
        self._error: FloatArray | None = None

    def forecast(self, upcoming: "TokenBatch | None", history: LoadHistory) -> LoadForecast:
        average = self.ema.forecast(upcoming, history)
        if upcoming is None or upcoming.requests is None:
            return replace(average, source=self.name)
        forecast = forecast_from_load(self.load(upcoming, average.share), made_at=len(history), source=self.name)
        self._share = forecast.share
        return replace(forecast, spread=average.spread if self._error is None else np.sqrt(self._error))

    def load(self, upcoming: "TokenBatch", average_LE: FloatArray) -> FloatArray:
        """Expected load `[L, E]` of a batch that names its requests, given the average shares."""
        assert upcoming.requests is not None
        counts = self.top_k * upcoming.computed.sum(1).numpy()
        rows = np.array([self._row.get(request, -1) for request in upcoming.requests.tolist()])
        known = rows >= 0
        load = counts[~known].sum() * average_LE
        if known.any():
            share = share_of(STRENGTH * average_LE + self._past[rows[known]])
            load = load + np.tensordot(counts[known], share, axes=1)
        return np.asarray(load)

    def observe(self, upcoming: "TokenBatch | None", load: LoadHistory, sequences: Loads | None = None) -> None:
        if self._share is not None:
            square = (self._share - share_of(load)) ** 2
            self._error = square if self._error is None else (1 - RECENT) * self._error + RECENT * square
            self._share = None
        if upcoming is None or upcoming.requests is None or sequences is None:
            return
        numbers = upcoming.requests.tolist()
        row = {request: place for place, request in enumerate(dict.fromkeys(numbers))}
        past = np.zeros((len(row), *load.shape))
        for request, place in row.items():
            if request in self._row:
                past[place] = self._past[self._row[request]]
        if len(row) == len(numbers):
            past += sequences
        else:  # a request with several sequences
            np.add.at(past, [row[request] for request in numbers], sequences)
        self._row, self._past = row, past
