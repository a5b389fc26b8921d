"""Telemetry: what each batch took in every MoE layer, for a Prometheus scraper, as JSON lines, and in Weights & Biases.

A batch becomes one document (see `figures`); every sink is handed the same. Rank 0 holds the figures of all ranks, so
it alone tells them.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data.arrays import FloatArray
from data.traces.loads import share_of, total_variation
from predictor.baselines.history import Ema
from runtime.balancing.split import balancedness
from runtime.engine.batch import BatchStats
from runtime.telemetry.exporters import Document, Exporter, JsonLines, PrometheusEndpoint, WandbRun

PROJECT = "switchcast"


def forecast_error(cost: BatchStats) -> FloatArray | None:
    """Total variation distance between the forecast a batch was prepared with and its load, `[L]`; None without one."""
    forecast = cost.preparation.forecast if cost.preparation else None
    if forecast is None:
        return None
    return total_variation(forecast.share, share_of(cost.load))


def figures(layers: Sequence[str], cost: BatchStats) -> Document:
    """A batch as plain numbers.

    `source` is the forecaster's name, "history" where the average of past loads took its place, and "none" where
    nothing was forecast or what was prepared came late. `moves` and `bytes` are what the preparation before the batch
    cost; `load_tv` is the forecast's error. `tiers` counts from the start of the run. Lists go by device
    (`device_tokens`, `busy_ms`) or rank (`waited_ms`).
    """
    done, errors = cost.preparation, forecast_error(cost)
    source = done.forecast.source if done and done.forecast else "none"
    moves = done.layer_moves if done else (0,) * len(layers)
    expert_bytes = done.nbytes // done.moves if done and done.moves else 0
    balance = balancedness(cost.device_load)
    return {
        "source": "history" if source == Ema.name else source,
        "load_tv": None if errors is None else float(errors.mean()),
        "compute_ms": cost.compute_ms,
        "exposed_ms": cost.exposed_ms,
        "forecast_ms": done.forecast_ms if done else None,
        "plan_ms": done.plan_ms if done else None,
        "move_ms": done.move_ms if done else None,
        "tiers": cost.tiers,
        "layers": [
            {
                "layer": name,
                "balancedness": float(balance[layer]),
                "load_tv": None if errors is None else float(errors[layer]),
                "tokens_local": int(cost.load[layer].sum() - cost.sent[layer]),
                "tokens_sent": int(cost.sent[layer]),
                "moves": moves[layer],
                "bytes": moves[layer] * expert_bytes,
                "device_tokens": cost.device_load[layer].tolist(),
                "busy_ms": cost.busy_ms[layer].tolist(),
                "waited_ms": cost.waited_ms[layer].tolist(),
            }
            for layer, name in enumerate(layers)
        ],
    }


def over_batches(costs: Sequence[BatchStats], names: Sequence[str]) -> list[Document]:
    """Each MoE layer: mean balancedness, median ms of the busiest device and of the longest wait, sums of the rest."""
    balance_NL = np.stack([balancedness(cost.device_load) for cost in costs])
    busy_NL = np.stack([cost.busy_ms.max(-1) for cost in costs])
    waited_NL = np.stack([cost.waited_ms.max(-1) for cost in costs])
    tokens_NL, sent_NL = np.stack([cost.load.sum(-1) for cost in costs]), np.stack([cost.sent for cost in costs])
    moved = [cost.preparation.layer_moves for cost in costs if cost.preparation]
    return [
        {
            "layer": name,
            "balancedness": float(balance_NL[:, layer].mean()),
            "busy_max_ms": float(np.median(busy_NL[:, layer])),
            "waited_ms": float(np.median(waited_NL[:, layer])),
            "sent_share": float(sent_NL[:, layer].sum() / max(1, tokens_NL[:, layer].sum())),
            "moves": sum(moves[layer] for moves in moved),
        }
        for layer, name in enumerate(names)
    ]


class Telemetry:
    """Tells every batch to the sinks that are asked for; a context that closes them. With none it does nothing.

    Args:
        port: Where to serve Prometheus metrics; 0 takes any free port.
        file: JSON lines are appended to it.
        wandb: Whether to begin a W&B run, or the project to begin it in; WANDB_MODE=offline keeps it on disk.
        folder: Where W&B keeps its files.
        settings: What W&B shows as the run's configuration.

    Attributes:
        port: The port served; None where none is.

    Raises:
        ValueError: If the port cannot be served, the file not be written, or W&B does not start.
    """

    def __init__(
        self,
        port: int | None = None,
        file: Path | None = None,
        wandb: bool | str = False,
        folder: Path = Path("outputs"),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.port: int | None = None
        self._batch, self._late, self._fallbacks = 0, 0, Counter[str]()
        self._sinks: list[Exporter] = []
        with ExitStack() as opened:  # closes those that are open if the next one cannot be
            if port is not None:
                endpoint = opened.push(PrometheusEndpoint(port))
                self.port = endpoint.port
                self._sinks.append(endpoint)
            if file is not None:
                self._sinks.append(opened.push(JsonLines(file)))
            if wandb:
                project = wandb if isinstance(wandb, str) else PROJECT
                self._sinks.append(opened.push(WandbRun(project, folder, settings or {})))
            self._opened = opened.pop_all()

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def record(
        self, layers: Sequence[str], cost: BatchStats, late: int = 0, fallbacks: Mapping[str, int] | None = None
    ) -> None:
        """Tells the next batch.

        Args:
            layers: Names of the MoE layers.
            cost: What the batch took.
            late: Preparations that came late so far, as `Controller.late` counts them.
            fallbacks: How often each reason made the controller fall back so far.
        """
        if not self._sinks:
            return
        so_far = Counter(dict(fallbacks or {}))
        document: Document = {
            "batch": self._batch,
            "time": time.time(),
            "late": late - self._late,
            "fallbacks": dict(so_far - self._fallbacks),
        } | figures(layers, cost)
        self._batch, self._late, self._fallbacks = self._batch + 1, late, so_far
        for sink in self._sinks:
            sink.add(document)
