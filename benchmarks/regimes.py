"""Regimes in which forecasts that learn pay, and in which they do not: prefill and decode, tokens a step, topics.

    python -m benchmarks.regimes outputs/traces/gpt-oss outputs/gpt-oss/predictor

serves the requests of a trace again in each regime, as `python -m runtime.simulate --serve` does, with 8 devices, 16
redundant experts, the home planner and the quota split. The free rivals, which need no training, are the last batch,
the moving average, and each request's own past. A gain is the difference between the adaptive forecast and the best of
them; "no gain" stands where it does not lower the error, or raises balancedness by less than .001. The sampling floor
is the error that is left to a forecaster that knows the true shares, if tokens draw their experts from them. Prints a
Markdown table and, in a pipe, one line of JSON.
"""

from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.cli import from_command_line, print_json, user_errors
from data.traces.store import open_trace
from predictor.evaluation.metrics import sampling_floor
from predictor.evaluation.tables import markdown
from runtime.simulate.comparison import compare_policies
from runtime.simulate.cost_model import Hardware
from runtime.simulate.serving import Order, Serve, served

FREE = ("last", "ema", "own")
"""Forecasts that need no predictor."""
DEVICES, REDUNDANT = 8, 16
LEAST_GAIN = 0.001
"""Balancedness below which a gain over the best free rival counts as none."""
PARTS = {"prefill": "known subjects", "unseen": "unseen subjects"}
"""Names of the phases that `data.convert` gives to requests."""
HARDWARE = Hardware(1e7, tokens_per_second=1e5, bytes_per_second=1e10, expert_overhead_tokens=0)
"""Speeds for the verdict, which is not shown here; given, so that none are measured."""


class Regime(NamedTuple):
    """How requests are served: their kind, number in a step, tokens of each, order, and part of the test."""

    kind: Serve
    slots: int
    chunk: int
    order: Order
    stream: str

    @property
    def title(self) -> str:
        """Its name in the table."""
        topics = "subject after subject" if self.order == "subject" else "subjects mixed"
        return f"{self.kind}, {self.slots} x {self.chunk} tokens, {topics}, {PARTS.get(self.stream, self.stream)}"


SIZES: tuple[tuple[Serve, int, int], ...] = (
    ("prefill", 4, 128), ("prefill", 16, 128), ("decode", 32, 1), ("decode", 128, 1)
)  # fmt: skip
ORDERS: tuple[Order, ...] = ("subject", "shuffled")


def measured(trace: Path, predictor: Path, regime: Regime, steps: int) -> dict[str, Any]:
    """Errors and balancedness of each forecast in one regime, over its first steps, and the sampling floor."""
    recorded, start = served(trace, regime.kind, regime.slots, regime.chunk, regime.order, regime.stream)
    steps = min(steps, len(recorded.loads) - start)
    report = compare_policies(
        recorded, DEVICES, REDUNDANT, (*FREE, "learned", "adaptive", "oracle"), ["home"], ["quota"], predictor, start,
        steps, HARDWARE,
    )  # fmt: skip
    top_k = open_trace(trace).layout.experts_per_token
    floors = [sampling_floor(torch.from_numpy(load).float(), top_k) for load in recorded.loads[start : start + steps]]
    rows = {row["forecast"]: {name: row[name] for name in ("load_tv", "balancedness")} for row in report["results"]}
    return {"regime": regime.title, "steps": steps, "floor": float(torch.stack(floors).mean()), "forecasts": rows}


def row(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    found, ours = result["forecasts"], result["forecasts"]["adaptive"]
    error = {name: found[name]["load_tv"] for name in FREE}
    balance = {name: found[name]["balancedness"] for name in FREE}
    best_error, best_balance = min(error, key=error.__getitem__), max(balance, key=balance.__getitem__)
    less, more = error[best_error] - ours["load_tv"], ours["balancedness"] - balance[best_balance]
    gain = "no gain" if less <= 0 else f"{less:.3f}"
    balance_gain = "no gain" if more < LEAST_GAIN else f"{more:.3f}"
    return [
        result["regime"], f"{result['floor']:.3f}", f"{error['last']:.3f}", f"{error[best_error]:.3f} ({best_error})",
        f"{found['learned']['load_tv']:.3f}", f"{ours['load_tv']:.3f}", gain, f"{balance['last']:.3f}",
        f"{balance[best_balance]:.3f} ({best_balance})", f"{found['learned']['balancedness']:.3f}",
        f"{ours['balancedness']:.3f}", balance_gain, f"{found['oracle']['balancedness']:.3f}",
    ]  # fmt: skip


HEADER = [
    "regime", "sampling floor", "load_tv: last", "best free", "learned", "adaptive", "gain", "balancedness: last",
    "best free", "learned", "adaptive", "gain", "oracle",
]  # fmt: skip


def regimes(trace: Path, predictor: Path, steps: int = 100, streams: str = "prefill,unseen") -> list[dict[str, Any]]:
    """Measures every regime.

    Args:
        trace: Token trace with requests.
        predictor: Folder that train.py wrote for it.
        steps: Most steps of a regime.
        streams: Phases of the test requests, apart.
    """
    torch.set_num_threads(1)
    each = product(SIZES, ORDERS, streams.split(","))
    return [measured(trace, predictor, Regime(*size, order, stream), steps) for size, order, stream in each]


def main() -> None:
    """Command line."""
    with user_errors():
        results = from_command_line(regimes)
    print(markdown(HEADER, [row(result) for result in results]))
    print_json({"devices": DEVICES, "redundant": REDUNDANT, "results": results})


if __name__ == "__main__":
    main()
