"""KernelTimes: how long a GPU computes its experts, from measured rows of one kernel and shape.

A row's time is taken to be

    overhead x tokens of the group + h(assignments on the GPU, active experts on the GPU)

The first term is there because these kernels are given the tokens of all GPUs. It is fitted to the rows of many tokens;
what is left is h, known along one curve for each EP size, because the size sets the experts of a GPU. On a curve, h is
interpolated between token counts on logarithmic axes; between curves, at equal assignments, linearly in the active
experts. Only balanced rows are used, whose loads are known. Rows of skewed loads are left to check the result:
`skewed_error`.

Shape suffixes: N steps, L layers, G devices; any shape will do.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.arrays import FloatArray
from runtime.gpu.skew import POWER, most_loaded
from runtime.gpu.tables import column

MANY_TOKENS = 4096
"""Tokens from which rows tell what a token costs, apart from launches and reading weights."""
FEWEST_ROWS = 6
"""Fewest rows of an EP size that make a curve."""


@dataclass(frozen=True)
class Error:
    """How far interpolated times were from measured ones that were left out: shares, 0.05 is 5 %."""

    median: float
    p90: float
    rows: int

    @classmethod
    def of(cls, predicted: FloatArray, measured: FloatArray) -> "Error":
        """Of predicted and measured times."""
        if not len(measured):
            return cls(float("nan"), float("nan"), 0)
        off = np.abs(predicted / measured - 1)
        return cls(float(np.median(off)), float(np.quantile(off, 0.9)), len(off))


@dataclass(frozen=True)
class Balanced:
    """Balanced rows of a site: tokens of the group, EP size and milliseconds, one entry a row."""

    tokens: FloatArray
    ep_size: FloatArray
    milliseconds: FloatArray

    def where(self, kept: np.ndarray) -> "Balanced":
        """Some of the rows."""
        return Balanced(self.tokens[kept], self.ep_size[kept], self.milliseconds[kept])


class KernelTimes:
    """Times of one kernel on one shape, interpolated between measured rows.

    Args:
        balanced: Rows of loads that are equal for all experts.
        num_experts: Experts of a layer in these rows, E.
        top_k: Experts of a token in these rows.
    """

    def __init__(self, balanced: Balanced, num_experts: int, top_k: int) -> None:
        self.rows, self.num_experts, self.top_k = balanced, num_experts, top_k
        self.overhead = self._fit_overhead()
        self.curves = [curve for size in np.unique(balanced.ep_size)[::-1] if (curve := self._curve(size))]
        if not self.curves:
            raise ValueError(f"no EP size has {FEWEST_ROWS} measured rows or more")
        self.experts = np.array([num_experts / curve[0] for curve in self.curves])

    @property
    def most_tokens(self) -> float:
        """Tokens of a group up to which rows were measured."""
        return float(self.rows.tokens.max())

    @property
    def most_devices(self) -> int:
        """Largest EP size that was measured."""
        return round(self.curves[0][0])

    @property
    def most_experts(self) -> int:
        """Most experts on one GPU that were measured."""
        return round(float(self.experts[-1]))

    def milliseconds(self, tokens: FloatArray, assignments: FloatArray, active: FloatArray) -> FloatArray:
        """Time of a GPU with so many assignments and active experts, in a group with so many tokens."""
        tokens, assignments, active = np.broadcast_arrays(tokens, assignments, active)
        busy = np.maximum(assignments, 1.0)
        place = np.clip(np.searchsorted(self.experts, active, side="right") - 1, 0, max(len(self.curves) - 2, 0))
        core = np.empty(busy.shape)
        for index in range(max(len(self.curves) - 1, 1)):
            here = place == index
            fewer, more = self.curves[index], self.curves[min(index + 1, len(self.curves) - 1)]
            known = [np.minimum(self.num_experts / curve[0], busy[here]) for curve in (fewer, more)]
            span = np.where(known[1] > known[0], known[1] - known[0], 1.0)
            weight = np.clip((active[here] - known[0]) / span, 0, 1)
            core[here] = (1 - weight) * _along(fewer, busy[here]) + weight * _along(more, busy[here])
        return np.where(assignments > 0, core, 0.0) + self.overhead * tokens

    def _fit_overhead(self) -> float:
        """Milliseconds a token of the group costs, whichever GPU computes it; never below 0."""
        many = self.rows.where(self.rows.tokens >= MANY_TOKENS)
        if len(np.unique(many.ep_size)) < 3:
            return 0.0
        rank = many.tokens * self.top_k / many.ep_size
        terms = np.stack([np.ones_like(rank), self.num_experts / many.ep_size, many.tokens, rank], -1)
        return float(_non_negative(terms / many.milliseconds[:, None])[2])

    def _curve(self, size: float) -> tuple[float, FloatArray, FloatArray, float] | None:
        """EP size, assignments, h and its slope at the end; None where there are too few rows."""
        rows = self.rows.where(self.rows.ep_size == size)
        order = np.argsort(rows.tokens)
        tokens, rank = rows.tokens[order], rows.tokens[order] * self.top_k / size
        core = np.maximum(rows.milliseconds[order] - self.overhead * tokens, 1e-4)
        tokens, rank, core = tokens[rank >= 1], rank[rank >= 1], core[rank >= 1]
        if len(rank) < FEWEST_ROWS:
            return None
        end = rank >= rank[-1] / 4
        slope = max(float(np.polyfit(rank[end], core[end], 1)[0]), 0.0) if end.sum() > 1 else 0.0
        return float(size), rank, core, slope

    def token_error(self) -> Error:
        """Each row left out in turn, but the first and last of its EP size, and interpolated from its neighbours."""
        predicted, measured = [], []
        for size, rank, core, _ in self.curves:
            tokens = rank[1:-1] * size / self.top_k
            for place in range(1, len(rank) - 1):
                around = [place - 1, place + 1]
                predicted.append(np.exp(np.interp(np.log(rank[place]), np.log(rank[around]), np.log(core[around]))))
            measured.append(core[1:-1] + self.overhead * tokens)
            predicted[-len(tokens) :] = list(np.array(predicted[-len(tokens) :]) + self.overhead * tokens)
        return Error.of(np.array(predicted), np.concatenate(measured))

    def ep_error(self) -> Error:
        """Each EP size but the first and last left out in turn, and its rows interpolated from the others."""
        sizes = [curve[0] for curve in self.curves][1:-1]
        pairs = []
        for size in sizes:
            rest, out = self.rows.where(self.rows.ep_size != size), self.rows.where(self.rows.ep_size == size)
            rank = out.tokens * self.top_k / size
            out, rank = out.where(rank >= 1), rank[rank >= 1]
            times = KernelTimes(rest, self.num_experts, self.top_k)
            active = np.minimum(self.num_experts / size, rank)
            pairs.append((times.milliseconds(out.tokens, rank, active), out.milliseconds))
        predicted, measured = (np.array([*chain(*parts)]) for parts in zip(*pairs, strict=True)) if pairs else ([], [])
        return Error.of(np.asarray(predicted), np.asarray(measured))

    def skewed(self, rows: pa.Table, power: float = POWER) -> tuple[FloatArray, FloatArray]:
        """Predicted and measured times of rows whose loads follow a power law.

        Args:
            rows: Rows of this site, of any distribution.
            power: The law's exponent.
        """
        skewed = rows.filter(pc.equal(rows["distribution"], f"power_law_{power}"))
        keys = zip(*(column(skewed, name).astype(int).tolist() for name in ("tokens", "ep_size")), strict=True)
        predicted = []
        for tokens, size in keys:
            loads = most_loaded(tokens, self.num_experts, self.top_k, size, power)
            predicted.append(float(self.milliseconds(np.array(tokens), loads.assignments, loads.active).mean()))
        return np.array(predicted), column(skewed, "milliseconds")

    def skewed_error(self, rows: pa.Table, power: float = POWER) -> Error:
        """How far the times of skewed rows are from those that their loads predict; none of them was used before."""
        return Error.of(*self.skewed(rows, power))


def _along(curve: tuple[float, FloatArray, FloatArray, float], assignments: FloatArray) -> FloatArray:
    """The curve's h; beyond its end, where only more skewed loads of as many tokens lie, with its last slope."""
    _, rank, core, slope = curve
    inside = np.exp(np.interp(np.log(assignments), np.log(rank), np.log(core)))
    return np.where(assignments > rank[-1], core[-1] + slope * (assignments - rank[-1]), inside)


def _non_negative(terms: FloatArray) -> FloatArray:
    """Least-squares weights of the columns, whose sum is one in every row: the most negative is dropped in turn."""
    kept = np.arange(terms.shape[1])
    weights = np.zeros(terms.shape[1])
    while len(kept):
        found = np.linalg.lstsq(terms[:, kept], np.ones(len(terms)), rcond=None)[0]
        if (found >= 0).all():
            weights[kept] = found
            break
        kept = np.delete(kept, found.argmin())
    return weights
