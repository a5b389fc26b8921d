"""AdaptiveForecaster: wraps a forecaster and goes on learning from the loads of the batches that run.

    adaptive = AdaptiveForecaster(load_predictor(folder), layout.num_layers, layout.num_experts)
    forecast = adaptive.forecast(tokens, history)
    ...                                                   # the batch runs
    adaptive.observe(tokens, load)                        # its load [L, E]

Ten forecasts are mixed, with weights for each MoE layer from their recent errors (`mixture`): that of the wrapped
forecaster; the same with a head that goes on learning (`head`); two corrections of each by what was observed of
similar sequences and of the same requests (`correction`); the last batch, a fast and a slow average, and each
request's own past. The spread comes from the mixture's own errors (`spread`). Where corrections contradict the wrapped
forecast, as on text that it was not trained on, weights and spread are others than where they agree with it: past
errors on familiar text say nothing there. Memory is bounded; a batch costs a few milliseconds.

Shape suffixes: B sequences, U units (see `UNIT`), F features, C forecasts that are mixed, L MoE layers, E logical
experts.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.arrays import Float32Array, FloatArray, IntArray
from data.traces.loads import share_of
from predictor.baselines.history import falling_weights
from predictor.baselines.own_past import OwnPast
from predictor.correction import CorrectionMemory, attributed
from predictor.forecast import Forecaster, LoadForecast, LoadHistory, Loads, SequenceForecast
from predictor.head import LearningHead
from predictor.mixture import ForecastMixture
from predictor.spread import OnlineSpread

if TYPE_CHECKING:  # it imports torch
    from data.traces.trace import TokenBatch

MIXED = ("wrapped", "head", "cautious", "head_cautious", "bold", "head_bold", "last", "fast", "slow", "own")
"""The forecasts that are mixed."""
FIRST = np.array([0.5, 0.0, 0.25, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0])
"""Their weights before anything was observed."""
CONTESTED = 0.1
"""Total variation (0 to 1) between the wrapped forecast and its corrections from which they contradict it."""
FIRST_CONTESTED = np.array([0.0, 0.25, 0.0, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0])
"""As `FIRST`, for contested forecasts."""
FAST, SLOW = 0.3, 0.05
"""Rates of the two averages."""
WINDOW = 64
"""Past batches that the averages use."""
UNIT = 32
"""Tokens from which a sequence is corrected on its own; neighbours with fewer are corrected together."""
PENDING = 4
"""Most forecasts that wait for the load of their batch."""
State = dict[str, np.ndarray[Any, Any]]


class Blend:
    """The mixture of one kind of forecasts, and its spread.

    Args:
        num_layers: L.
        first: Weights before anything was observed.
    """

    def __init__(self, num_layers: int, first: FloatArray = FIRST) -> None:
        self.mixture, self.spread = ForecastMixture(num_layers, first), OnlineSpread(num_layers)

    def state(self) -> State:
        """What was learned, by name."""
        state: State = {"weight": self.mixture.weight, "errors": self.mixture.errors}
        error = self.spread.error
        return state | ({} if error is None else {"square": error, "log_factor": self.spread.log_factor})

    def restore(self, state: State) -> None:
        """Takes over a `state`."""
        self.mixture.weight, self.mixture.errors = state["weight"], state["errors"]
        if "square" in state:
            self.spread.error, self.spread.log_factor = state["square"], state["log_factor"]


class _Units(NamedTuple):
    """What is corrected on its own: a sequence, or several neighbours where sequences are short.

    Decoding forecasts one token of each sequence, from which little can be told. The requests are None where they are
    not known or units hold several.
    """

    first: IntArray
    """First sequence of each unit, `[U]`."""
    forecast: Float32Array
    """Loads by the wrapped forecaster and with the head, `[2, U, L, E]`."""
    features: Float32Array
    """Features of each unit, `[U, F]`."""
    requests: IntArray | None


@dataclass(frozen=True)
class _Made:
    """A forecast whose batch has not been observed yet: what was mixed, `[C, L, E]`; its units, if tokens are known."""

    upcoming: "TokenBatch | None"
    blend: Blend
    mixed: FloatArray
    parts: SequenceForecast
    units: _Units | None
    share: FloatArray
    spread: FloatArray


class AdaptiveForecaster:
    """A forecaster that corrects another one by what was observed.

    Args:
        wrapped: Any forecaster. One with a method `forecast_by_sequence`, which returns a forecast and its
            `SequenceForecast`, is corrected sequence by sequence, any other batch by batch.
        num_layers: L.
        num_experts: E.
    """

    name = "adaptive"

    def __init__(self, wrapped: Forecaster, num_layers: int, num_experts: int) -> None:
        self.wrapped, self.shape = wrapped, (num_layers, num_experts)
        self.head = LearningHead(num_layers, num_experts)
        self.memory = CorrectionMemory(num_layers, num_experts, num_forecasters=2)
        self.known, self.unknown = Blend(num_layers), Blend(num_layers)
        self.contested = Blend(num_layers, FIRST_CONTESTED)
        self._own = OwnPast(top_k=1)  # only its shares are used
        self._pending: deque[_Made] = deque(maxlen=PENDING)

    def forecast(self, upcoming: "TokenBatch | None", history: LoadHistory) -> LoadForecast:
        base, parts = self._wrapped(upcoming, history)
        blend, units, corrected = self.unknown, None, [base.share] * 6
        if upcoming is not None and upcoming.num_tokens > 0:
            units = self._units(upcoming, parts)
            loads = (units.forecast, *self.memory.correct(units.forecast, units.requests))
            corrected = [share_of(load_LE) for load_CULE in loads for load_LE in load_CULE.sum(1, dtype=np.float64)]
            corrected[0] = base.share
            blend = self.contested if contradiction(corrected) > CONTESTED else self.known
        mixed = np.stack([*corrected, *self._from_history(base.share, upcoming, history)])
        share = share_of(blend.mixture.combine(mixed))
        spread = blend.spread.of(share, base.tokens, blend.mixture.disagreement(mixed))
        self._pending.append(_Made(upcoming, blend, mixed, parts, units, share, spread))
        return replace(base, share=share, spread=spread, source=self.name)

    def observe(self, upcoming: "TokenBatch | None", load: LoadHistory, sequences: Loads | None = None) -> None:
        made = self._take(upcoming)
        if made is None:
            return
        truth, carried = share_of(load), load.sum(-1) > 0
        made.blend.mixture.observe(made.mixed, truth, carried)
        made.blend.spread.observe(made.share, made.spread, truth, carried)
        if (units := made.units) is None or upcoming is None:
            return
        if sequences is None or len(sequences) != len(made.parts.load):
            sequences = attributed(made.parts.load, load)
        observed = np.add.reduceat(sequences.astype(np.float32), units.first, axis=0)
        self.head.learn(units.forecast[0], observed, units.features)
        self.memory.add(units.forecast, observed, units.requests)
        if upcoming.requests is not None and len(upcoming.requests) == len(sequences):
            self._own.observe(upcoming, load, sequences)

    def state(self) -> State:
        """What was learned, by name; requests are left out, because they end with the run."""
        parts: dict[str, State] = {
            "memory": self.memory.state(), "head": self.head.state(), "known": self.known.state(),
            "contested": self.contested.state(), "unknown": self.unknown.state(),
        }  # fmt: skip
        return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}

    def restore(self, state: State) -> None:
        """Goes on from a `state`.

        Raises:
            ValueError: If it is of another number of layers, experts or mixed forecasts.
        """
        layers = self.shape[0]
        fixed = {
            "weight": (layers, len(MIXED)), "errors": (layers, len(MIXED), len(MIXED)),
            "square": self.shape, "log_factor": (layers,),
        }  # fmt: skip
        for name, value in state.items():
            learned = {"forecast": (2, *value.shape[1:2], *self.shape), "products": (len(value), len(value))}
            expected = (fixed | learned).get(name.partition(".")[2], (len(value), *self.shape))
            if value.shape != expected or not np.isfinite(value).all():
                raise ValueError(f"{name} has shape {value.shape}, expected finite numbers {expected}")
        for name, restore in (
            ("memory", self.memory.restore), ("head", self.head.restore), ("known", self.known.restore),
            ("contested", self.contested.restore), ("unknown", self.unknown.restore),
        ):  # fmt: skip
            part = {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}.")}
            if part or name != "contested":  # states of earlier versions lack it
                restore(part)

    def _wrapped(self, upcoming: "TokenBatch | None", history: LoadHistory) -> tuple[LoadForecast, SequenceForecast]:
        """The wrapped forecaster's forecast, and its parts by sequence, or as a whole."""
        by_sequence = getattr(self.wrapped, "forecast_by_sequence", None)
        base, parts = (
            (self.wrapped.forecast(upcoming, history), None) if by_sequence is None else by_sequence(upcoming, history)
        )
        whole = SequenceForecast(base.load[None].astype(np.float32), np.zeros((1, 0), np.float32))
        return base, parts or whole

    def _units(self, upcoming: "TokenBatch", parts: SequenceForecast) -> _Units:
        """The units of a batch, with their sequences' summed loads and mean features."""
        size = len(parts.load)
        units = min(max(upcoming.num_tokens // UNIT, 1), size)
        first = np.arange(units) * size // units
        load_ULE = np.add.reduceat(parts.load, first, axis=0)
        counts = np.diff(first, append=size)[:, None]
        features_UF = (np.add.reduceat(parts.features, first, axis=0) / counts).astype(np.float32)
        named = units == size and upcoming.requests is not None and len(upcoming.requests) == size
        requests = upcoming.requests.numpy() if named and upcoming.requests is not None else None
        return _Units(first, np.stack([load_ULE, self.head.correct(load_ULE, features_UF)]), features_UF, requests)

    def _from_history(
        self, base_LE: FloatArray, upcoming: "TokenBatch | None", history: LoadHistory
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Shares of the last batch, of a fast and a slow average, and of the requests' own past, `[L, E]` each.

        Before any batch has run, the wrapped forecast takes their place.
        """
        if not len(history):
            return base_LE, base_LE, base_LE, base_LE
        recent = history[-WINDOW:].astype(np.float64)
        fast, slow = (
            share_of(np.tensordot(falling_weights(len(recent), rate), recent, axes=1)) for rate in (FAST, SLOW)
        )
        own = fast if upcoming is None or upcoming.requests is None else share_of(self._own.load(upcoming, fast))
        return share_of(history[-1]), fast, slow, own

    def _take(self, upcoming: "TokenBatch | None") -> _Made | None:
        """The oldest forecast of this batch, which no longer waits, nor do the forecasts before it."""
        for number, made in enumerate(self._pending):
            if _same(made.upcoming, upcoming):
                for _ in range(number + 1):
                    self._pending.popleft()
                return made
        return None


def contradiction(corrected_LE: Sequence[FloatArray]) -> float:
    """Total variation between the wrapped forecast and the mean of two corrections, those by features and by memory.

    Args:
        corrected_LE: Shares of the first forecasts in `MIXED`.
    """
    wrapped, head, bold = (corrected_LE[MIXED.index(name)] for name in ("wrapped", "head", "bold"))
    return float(0.5 * np.abs(wrapped - (head + bold) / 2).sum(-1).mean())


def _same(one: "TokenBatch | None", other: "TokenBatch | None") -> bool:
    """Whether two batches have the same tokens."""
    if one is None or other is None or one is other:
        return one is other
    return one.mask.equal(other.mask) and one.input_ids.equal(other.input_ids)
