"""KernelTimes: how long a GPU computes its experts, from measured rows of one kernel and shape.

A row's time is taken to be

    overhead x tokens of the group + h(assignments on the GPU, active experts on the GPU)

The first term is there because these kernels are given the tokens of all GPUs. It is fitted to the rows of many tokens;
what is left is h, known along one curve for each EP size, because the size sets the experts of a GPU. On a curve, h is
interpolated between token counts on logarithmic axes; between curves, at equal assignments, linearly in the active
experts. Rows whose loads are known are used: balanced ones. Rows of skewed loads are left to check the result
(`Site.skewed_error`).

Shape suffixes: C curves, Q queries.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.arrays import BoolArray, FloatArray
from runtime.gpu.tables import column

MANY_TOKENS = 4096
"""Tokens from which rows tell what a token costs, apart from launches and reading weights."""
FEWEST_ROWS = 6
"""Fewest rows of an EP size that make a curve."""
CHUNK = 2**16
"""Queries that are answered together."""


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
class KnownRows:
    """Rows whose loads are known, one entry a row.

    Attributes:
        tokens: Tokens of the group.
        ep_size: GPUs of the group.
        assignments: Tokens of the GPU that was timed; a token counts once for each of its experts there.
        active: Experts of that GPU that have tokens.
        milliseconds: Time.
    """

    tokens: FloatArray
    ep_size: FloatArray
    assignments: FloatArray
    active: FloatArray
    milliseconds: FloatArray

    @classmethod
    def balanced(cls, rows: pa.Table, num_experts: int, top_k: int) -> "KnownRows":
        """The balanced rows of a table: every expert has as many tokens as every other, give or take one."""
        even = rows.filter(pc.equal(rows["distribution"], "balanced"))
        tokens, size, time = (column(even, name) for name in ("tokens", "ep_size", "milliseconds"))
        rank = tokens * top_k / size
        return cls(tokens, size, rank, np.minimum(num_experts / size, rank), time).where(rank >= 1)

    def where(self, kept: BoolArray) -> "KnownRows":
        """Some of the rows."""
        return KnownRows(*(getattr(self, field.name)[kept] for field in fields(self)))


class Curve(NamedTuple):
    """What is left of the rows of one EP size without the overhead, by rising assignments."""

    assignments: FloatArray
    active: FloatArray
    core: FloatArray
    slope: float

    @classmethod
    def of(cls, rows: KnownRows, overhead: float) -> "Curve":
        """Of the rows of one EP size."""
        order = np.argsort(rows.assignments, kind="stable")
        rank = rows.assignments[order]
        order, rank = order[np.diff(rank, prepend=0) > 0], rank[np.diff(rank, prepend=0) > 0]
        core = np.maximum(rows.milliseconds[order] - overhead * rows.tokens[order], 1e-4)
        end = rank >= rank[-1] / 4
        slope = max(float(np.polyfit(rank[end], core[end], 1)[0]), 0.0) if end.sum() > 1 else 0.0
        return cls(rank, rows.active[order], core, slope)

    def at(self, assignments: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Active experts and h; beyond the end, where only more skewed loads lie, h goes on with its last slope."""
        log, known = np.log(assignments), np.log(self.assignments)
        inside = np.exp(np.interp(log, known, np.log(self.core)))
        beyond = self.core[-1] + self.slope * (assignments - self.assignments[-1])
        return np.interp(log, known, self.active), np.where(assignments > self.assignments[-1], beyond, inside)


class KernelTimes:
    """Times of one kernel on one shape, interpolated between measured rows.

    Args:
        rows: Rows whose loads are known.

    Raises:
        ValueError: If no EP size has enough rows.
    """

    def __init__(self, rows: KnownRows) -> None:
        self.rows = rows
        self.overhead = self._fit_overhead()
        sizes, counts = np.unique(rows.ep_size, return_counts=True)
        self.sizes = sizes[counts >= FEWEST_ROWS][::-1]
        self.curves = [Curve.of(rows.where(rows.ep_size == size), self.overhead) for size in self.sizes]
        if not self.curves:
            raise ValueError(f"no EP size has {FEWEST_ROWS} measured rows or more")

    @property
    def most_tokens(self) -> float:
        """Tokens of a group up to which rows were measured."""
        return float(self.rows.tokens.max())

    @property
    def most_devices(self) -> int:
        """Largest EP size that was measured."""
        return round(float(self.sizes[0]))

    @property
    def most_experts(self) -> int:
        """Most experts on one GPU that were measured."""
        return round(float(self.rows.active.max()))

    def milliseconds(self, tokens: FloatArray, assignments: FloatArray, active: FloatArray) -> FloatArray:
        """Time of a GPU with so many assignments and active experts, in a group with so many tokens."""
        tokens, assignments, active = np.broadcast_arrays(tokens, assignments, active)
        flat, among = assignments.ravel(), active.ravel()
        core = [self._core(flat[at : at + CHUNK], among[at : at + CHUNK]) for at in range(0, len(flat), CHUNK)]
        return np.asarray(np.concatenate(core).reshape(assignments.shape) + self.overhead * tokens)

    def _core(self, assignments: FloatArray, active: FloatArray) -> FloatArray:
        """Times without overhead, `[Q]`: linear in active experts, between curves at equal assignments."""
        known = [curve.at(np.maximum(assignments, 1.0)) for curve in self.curves]
        active_CQ = np.maximum.accumulate([found[0] for found in known])
        core_CQ = np.array([found[1] for found in known])
        above = np.clip((active_CQ < active).sum(0), min(1, len(known) - 1), len(known) - 1)
        query = np.arange(len(assignments))
        low, high = active_CQ[above - 1, query], active_CQ[above, query]
        weight = np.clip((active - low) / np.where(high > low, high - low, 1.0), 0, 1)
        core = (1 - weight) * core_CQ[above - 1, query] + weight * core_CQ[above, query]
        return np.where(assignments > 0, core, 0.0)

    def _fit_overhead(self) -> float:
        """Milliseconds a token of the group costs, whichever GPU computes it; never below 0."""
        many = self.rows.where(self.rows.tokens >= MANY_TOKENS)
        if len(np.unique(many.ep_size)) < 3:
            return 0.0
        terms = np.stack([np.ones_like(many.tokens), many.active, many.tokens, many.assignments], -1)
        return float(_non_negative(terms / many.milliseconds[:, None])[2])

    def token_error(self) -> Error:
        """Each row left out in turn, but the first and last of its EP size, and interpolated from its neighbours."""
        predicted, measured = [], []
        for size, curve in zip(self.sizes, self.curves, strict=True):
            log, core = np.log(curve.assignments), np.log(curve.core)
            share = (log[1:-1] - log[:-2]) / (log[2:] - log[:-2])
            top = self.rows.where(self.rows.ep_size == size)
            overhead = self.overhead * np.interp(curve.assignments, *np.sort([top.assignments, top.tokens], -1))[1:-1]
            predicted.append(np.exp(core[:-2] + share * (core[2:] - core[:-2])) + overhead)
            measured.append(curve.core[1:-1] + overhead)
        return Error.of(np.concatenate(predicted), np.concatenate(measured))

    def ep_error(self) -> Error:
        """Each EP size but the first and last left out in turn, and its rows interpolated from the others."""
        predicted, measured = [np.empty(0)], [np.empty(0)]
        for size in self.sizes[1:-1]:
            out = self.rows.where(self.rows.ep_size == size)
            times = KernelTimes(self.rows.where(self.rows.ep_size != size))
            predicted.append(times.milliseconds(out.tokens, out.assignments, out.active))
            measured.append(out.milliseconds)
        return Error.of(np.concatenate(predicted), np.concatenate(measured))


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
