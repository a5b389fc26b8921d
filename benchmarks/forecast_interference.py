"""How much a forecast slows the thread that launches the model's operators.

    python -m benchmarks.forecast_interference
    python -m benchmarks.forecast_interference --predictor outputs/predictor

On a GPU the forward is often bound by the thread that launches kernels, and a forecast on another thread of the process
takes the interpreter from it. A loop of small torch operators stands in for the launching thread. It is timed alone,
beside a thread that computes without the interpreter (what a busy core costs anyway), and beside a thread that
forecasts. The three alternate, and ratios are taken within each round. `delay_ms` is the time by which one forecast
delays the launching thread, beyond what a busy core does. Time in which the launching thread waits for a core is left
out, because on a shared machine it would hide everything else. Prints a table and, in a pipe, one line of JSON.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.forecast_cost import forecaster
from data.cli import from_command_line, print_json, user_errors
from data.models.model import load_model
from data.models.weights import BUNDLED
from data.traces.trace import TokenBatch
from predictor.checkpoint import load_predictor
from predictor.forecast import Forecaster

SIZES = ((16, 128), (64, 128))
PAST, OPERATORS = 64, 20_000
"""Past loads of a forecast, and operators that the launching thread launches in one window of a round."""


def seconds_without_core() -> float:
    """Seconds that this thread could have run so far, but other threads had the cores; 0 where Linux does not say."""
    path = Path("/proc/thread-self/schedstat")
    return int(path.read_text().split()[1]) / 1e9 if path.exists() else 0.0


def launch(a: torch.Tensor, b: torch.Tensor) -> None:
    """Launches operators whose arithmetic takes no time, as the host of a GPU does."""
    for _ in range(OPERATORS // 4):
        c = a + b
        c = torch.relu(c)
        c = c.view(-1)
        c.mul_(2.0)


class Beside:
    """A thread that repeats a call inside `running`.

    Attributes:
        done: Calls made inside the last `running`; a call that had begun before or ended after counts in part.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self.done = 0.0
        self._call, self._wanted, self._closed = call, threading.Event(), False
        self._began, self._busy, self._spans = threading.Event(), threading.Lock(), list[tuple[float, float]]()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._wanted.wait() and not self._closed:
            with self._busy:
                if self._wanted.is_set():
                    began = time.perf_counter()
                    self._began.set()
                    self._call()
                    self._spans.append((began, time.perf_counter()))

    @contextmanager
    def running(self) -> Iterator[None]:
        """The thread repeats its call inside the block; afterwards its last call is waited for."""
        self._spans.clear()
        self._began.clear()
        self._wanted.set()
        self._began.wait()
        start = time.perf_counter()
        yield
        stop = time.perf_counter()
        self._wanted.clear()
        with self._busy:
            pass
        self.done = sum(max(0.0, min(stop, end) - max(start, begin)) / (end - begin) for begin, end in self._spans)

    def close(self) -> None:
        """Ends the thread."""
        self._closed = True
        self._wanted.set()
        self._thread.join()


def rounds(forecast: Callable[[], Any], count: int) -> dict[str, Any]:
    """Times of the launching thread's windows, over those alone, and what a forecast takes and costs."""
    torch.manual_seed(0)
    a, b, big = torch.rand(4, 4), torch.rand(4, 4), torch.rand(1200, 1200)
    arms = {"control": Beside(lambda: big @ big), "forecast": Beside(forecast)}
    windows: dict[str, list[float]] = {"alone": [], "control": [], "forecast": []}
    forecast_ms, made = [], 0.0
    for number in range(count + 1):
        for name, kept in windows.items():
            with arms[name].running() if name in arms else nullcontext():
                taken = window(a, b)
            if number:  # the first round is a warm-up
                kept.append(taken)
                made += arms[name].done if name == "forecast" else 0.0
        began = time.perf_counter()
        forecast()
        forecast_ms.append(1e3 * (time.perf_counter() - began))
    for arm in arms.values():
        arm.close()
    alone, control, during = (np.array(kept) for kept in windows.values())
    delay_ms = 1e3 * float((during - control).sum()) / made
    return {
        "operator_us": round(1e6 * float(np.median(alone)) / OPERATORS, 2),
        "control": quartiles(control / alone),
        "ratio": quartiles(during / alone),
        "forecasts": round(made, 1),
        "forecast_ms": round(float(np.median(forecast_ms[1:])), 2),
        "delay_ms": round(delay_ms, 2),
    }


def window(a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds that the launches took; those without a core are left out."""
    began, waited = time.perf_counter(), seconds_without_core()
    launch(a, b)
    return time.perf_counter() - began - (seconds_without_core() - waited)


def quartiles(values: Any) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return [round(float(value), 3) for value in np.quantile(values, [0.25, 0.5, 0.75])]


def forecast_interference(predictor: Path | None = None, pairs: int = 20) -> list[dict[str, Any]]:
    """Measures how much a forecast slows a thread that launches small operators.

    Args:
        predictor: A trained predictor of the bundled model; by default random weights of configs/default.yaml, which
            take the same time.
        pairs: Number of rounds.

    Raises:
        ValueError: If the predictor cannot be loaded, or `pairs` is below 1.
    """
    if pairs < 1:
        raise ValueError(f"pairs is {pairs}; at least 1 is needed")
    torch.set_num_threads(1)  # one core launches, the other one forecasts
    layout = load_model(BUNDLED).layout
    made: Forecaster = forecaster(layout, "default.yaml") if predictor is None else load_predictor(predictor, layout)
    rng, results = np.random.default_rng(0), []
    for sequences, length in SIZES:
        ids = torch.from_numpy(rng.integers(0, layout.vocab_size, (sequences, length)))
        tokens = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))
        past = rng.integers(0, 99, (PAST, layout.num_layers, layout.num_experts))
        found = rounds(lambda tokens=tokens, past=past: made.forecast(tokens, past), pairs)  # type: ignore[misc]
        results.append({"sequences": sequences, "length": length} | found)
    return results


def main() -> None:
    """Command line: a table, then one JSON document."""
    with user_errors():
        results = from_command_line(forecast_interference)
    table = Table(title="A thread that launches operators beside a forecast; medians, quartiles in brackets")
    for column in ("tokens", "operator us", "beside a busy core", "beside a forecast", "forecasts", "forecast ms",
                   "delay ms"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in results:
        pair = (row[name] for name in ("control", "ratio"))
        table.add_row(
            f"{row['sequences']} x {row['length']}", f"{row['operator_us']:.1f}",
            *(f"{middle:.2f} ({low:.2f}-{high:.2f})" for low, middle, high in pair), f"{row['forecasts']:.0f}",
            f"{row['forecast_ms']:.1f}", f"{row['delay_ms']:.2f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    print_json({"torch": torch.__version__, "results": results})


if __name__ == "__main__":
    main()
