"""Gains of replicas as measured and as predicted, on the rows that were measured with replicas and without.

    python -m benchmarks.replica_rows

Times are interpolated as `runtime.simulate --gpu` does it, between rows placed by EPLB on 256 slots, without replicas,
of exponent 1.01. Predicted are rows of exponent 1.2, of which none was used: the gain of 32 replicas over EPLB without
replicas, and over experts that stay at home. Prints a Markdown table, the rows that are off by more than 10 %, and, in
a pipe, one line of JSON.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.cli import print_json
from predictor.evaluation.tables import markdown
from runtime.gpu.excerpt import WITH_REPLICAS
from runtime.gpu.kernel_time import KernelTimes, KnownRows
from runtime.gpu.replica_rows import LARGEST, replica_rows
from runtime.gpu.tables import column

USED, TESTED = 1.01, 1.2
CLOSE = 0.1
"""Largest error of a gain that counts as close."""
HOME, EPLB, REPLICAS = (False, 256), (True, 256), (True, 288)
"""Whether EPLB placed the experts, and the slots."""
BASES = {"EPLB without replicas": EPLB, "experts at home": HOME}


class Gain(NamedTuple):
    """Time without replicas over time with them, in one pair of rows."""

    gpu: str
    hidden_size: int
    ep_size: int
    tokens: int
    measured: float
    predicted: float

    @property
    def close(self) -> bool:
        """Whether the prediction is."""
        return abs(self.predicted / self.measured - 1) <= CLOSE


def interpolation(rows: pa.Table) -> KernelTimes:
    """From the rows of one shape that nothing is tested on."""
    used = _chosen(rows, EPLB, USED)
    names = ("tokens", "ep_size", "assignments", "active", "milliseconds")
    return KernelTimes(KnownRows(*(column(used, name) for name in names)))


def gains(rows: pa.Table, base: tuple[bool, int]) -> list[Gain]:
    """Measured and predicted gains of the tested rows of one shape."""
    times = interpolation(rows)
    sides = []
    for placed in (base, REPLICAS):
        side = _chosen(rows, placed, TESTED)
        load = (column(side, name) for name in ("tokens", "assignments", "active"))
        keys = zip(side["ep_size"].to_pylist(), side["tokens"].to_pylist(), strict=True)
        found = zip(column(side, "milliseconds"), times.milliseconds(*load), strict=True)
        sides.append(dict(zip(keys, found, strict=True)))
    without, replicated = sides
    gpu, hidden = rows["gpu"][0].as_py(), rows["hidden_size"][0].as_py()
    return [
        Gain(gpu, hidden, *key, *(float(a / b) for a, b in zip(without[key], found, strict=True)))
        for key, found in replicated.items()
    ]


def _chosen(rows: pa.Table, placed: tuple[bool, int], power: float) -> pa.Table:
    """The rows of one placement and exponent; their EP sizes up to the largest with replicas where they are tested."""
    kept = pc.and_(pc.equal(rows["eplb"], placed[0]), pc.equal(rows["slots"], placed[1]))
    kept = pc.and_(kept, pc.less(pc.abs(pc.subtract(rows["power"], power)), 1e-3))
    return rows.filter(kept if power == USED else pc.and_(kept, pc.less_equal(rows["ep_size"], LARGEST)))


def all_gains() -> dict[str, list[Gain]]:
    """Gains over each base, on every GPU and shape."""
    found: dict[str, list[Gain]] = {name: [] for name in BASES}
    for gpu in WITH_REPLICAS:
        rows = replica_rows(gpu)
        for hidden in sorted(set(rows["hidden_size"].to_pylist())):
            shape = rows.filter(pc.equal(rows["hidden_size"], hidden))
            for name, base in BASES.items():
                found[name] += gains(shape, base)
    return found


def summary(found: list[Gain]) -> dict[str, Any]:
    """How close the predictions are."""
    off = np.array([abs(gain.predicted / gain.measured - 1) for gain in found])
    return {
        "rows": len(found),
        "close": round(float((off <= CLOSE).mean()), 3),
        "median": round(float(np.median(off)), 3),
        "p90": round(float(np.quantile(off, 0.9)), 3),
    }


def main() -> None:
    """Prints the tables."""
    found = all_gains()
    lines, report = [], {}
    for name, pairs in found.items():
        parts = {"all": pairs, "256 tokens or more": [pair for pair in pairs if pair.tokens >= 256]}
        report[name] = {part: summary(chosen) for part, chosen in parts.items()}
        for part, figures in report[name].items():
            lines.append([name, part, str(figures["rows"]), f"{figures['close']:.0%}", f"{figures['median']:.1%}",
                          f"{figures['p90']:.1%}"])  # fmt: skip
    print(markdown(["gain of 32 replicas over", "rows", "number", "within 10 %", "median error", "p90"], lines))
    rest = [pair for pair in found["EPLB without replicas"] if not pair.close]
    print(f"\nThe {len(rest)} rows over EPLB without replicas that are further off:\n")
    cells = [[pair.gpu, *map(str, pair[1:4]), f"{pair.measured:.2f}", f"{pair.predicted:.2f}"] for pair in rest]
    print(markdown(["GPU", "hidden size", "EP size", "tokens", "measured", "predicted"], cells))
    print_json(report)


if __name__ == "__main__":
    main()
