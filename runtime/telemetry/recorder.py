"""Telemetry: what each batch took in every MoE layer, for Prometheus, as JSON lines, and in Weights & Biases.

A batch becomes one document (see `figures`), which every exporter gets. Rank 0 has the figures of all ranks and is the
only one that exports.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from data.arrays import FloatArray
from data.traces.loads import share_of, total_variation
from predictor.baselines.history import Ema
from runtime.balancing.split import balancedness
from runtime.engine.batch import BatchStats
from runtime.telemetry.exporters import Document, Exporter, JsonLines, PrometheusEndpoint, WandbRun

PROJECT = "switchcast"


def forecast_error(stats: BatchStats) -> FloatArray | None:
    """Total variation distance between the forecast a batch was prepared with and its load, `[L]`; None without one.

    NaN in a layer without load, which no forecast is right or wrong about.
    """
    forecast = stats.preparation.forecast if stats.preparation else None
    if forecast is None:
        return None
    return np.where(stats.load.sum(-1) > 0, total_variation(forecast.share, share_of(stats.load)), np.nan)


def _number(value: float) -> float | None:
    """A figure for JSON, which has no NaN."""
    return None if np.isnan(value) else float(value)


def _mean(values: FloatArray) -> float | None:
    """The mean of the figures that exist; None without any."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def figures(layers: Sequence[str], stats: BatchStats) -> Document:
    """A batch as plain numbers, for JSON.

    `source` is the forecaster's name, "history" if the average of past loads took its place, and "none" if nothing was
    forecast or the preparation was late. `moves` and `bytes` count what the preparation before the batch copied;
    `load_tv` is the forecast's error. `tiers` counts from the start of the run. Lists have one entry a device
    (`device_tokens`, `busy_ms`) or a rank (`waited_ms`). `compute_ms`, `busy_ms` and `waited_ms` are None if times were
    not measured; `balancedness` and `load_tv` of a layer are None if no token reached it, and no mean counts it.
    """
    done, errors = stats.preparation, forecast_error(stats)
    source = done.forecast.source if done and done.forecast else "none"
    moves = done.layer_moves if done else (0,) * len(layers)
    expert_bytes = done.nbytes // done.moves if done and done.moves else 0
    balance = balancedness(stats.device_load)
    return {
        "source": "history" if source == Ema.name else source,
        "load_tv": None if errors is None else _mean(errors),
        "compute_ms": stats.compute_ms if stats.measured else None,
        "exposed_ms": stats.exposed_ms,
        "forecast_ms": done.forecast_ms if done else None,
        "plan_ms": done.plan_ms if done else None,
        "move_ms": done.move_ms if done else None,
        "tiers": stats.tiers,
        "layers": [
            {
                "layer": name,
                "balancedness": _number(balance[layer]),
                "load_tv": None if errors is None else _number(errors[layer]),
                "tokens_local": int(stats.load[layer].sum() - stats.sent[layer]),
                "tokens_sent": int(stats.sent[layer]),
                "moves": moves[layer],
                "bytes": moves[layer] * expert_bytes,
                "device_tokens": stats.device_load[layer].tolist(),
                "busy_ms": stats.busy_ms[layer].tolist() if stats.measured else None,
                "waited_ms": stats.waited_ms[layer].tolist() if stats.measured else None,
            }
            for layer, name in enumerate(layers)
        ],
    }


def over_batches(batches: Sequence[BatchStats], names: Sequence[str]) -> list[Document]:
    """Each MoE layer over all batches: mean balancedness, median ms of the busiest device and longest wait, sums.

    Balancedness is the mean over `batches`, those with tokens in the layer; None where there are none.
    """
    balance_NL = np.stack([balancedness(stats.device_load) for stats in batches])
    busy_NL = np.stack([stats.busy_ms.max(-1) for stats in batches])
    waited_NL = np.stack([stats.waited_ms.max(-1) for stats in batches])
    tokens_NL, sent_NL = (
        np.stack([stats.load.sum(-1) for stats in batches]),
        np.stack([stats.sent for stats in batches]),
    )
    moved = [stats.preparation.layer_moves for stats in batches if stats.preparation]
    return [
        {
            "layer": name,
            "batches": int(np.isfinite(balance_NL[:, layer]).sum()),
            "balancedness": _mean(balance_NL[:, layer]),
            "busy_max_ms": float(np.median(busy_NL[:, layer])),
            "waited_ms": float(np.median(waited_NL[:, layer])),
            "sent_share": float(sent_NL[:, layer].sum() / max(1, tokens_NL[:, layer].sum())),
            "moves": sum(moves[layer] for moves in moved),
        }
        for layer, name in enumerate(names)
    ]


class Telemetry:
    """Sends every batch to the exporters that were asked for; a context that closes them. Without any it does nothing.

    Args:
        port: Port to serve Prometheus metrics on; 0 takes any free one.
        file: File that JSON lines are appended to.
        wandb: Whether to start a W&B run, or the project to start it in; WANDB_MODE=offline keeps it on disk.
        folder: Folder for W&B's files.
        settings: The run's configuration in W&B.

    Attributes:
        port: The port that is served, or None.

    Raises:
        ValueError: If the port cannot be served, the file cannot be written, or W&B does not start.
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
        self._exporters: list[Exporter] = []
        with ExitStack() as opened:  # closes the open ones if the next one cannot be opened
            if port is not None:
                endpoint = opened.push(PrometheusEndpoint(port))
                self.port = endpoint.port
                self._exporters.append(endpoint)
            if file is not None:
                self._exporters.append(opened.push(JsonLines(file)))
            if wandb:
                project = wandb if isinstance(wandb, str) else PROJECT
                self._exporters.append(opened.push(WandbRun(project, folder, settings or {})))
            self._opened = opened.pop_all()

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def record(
        self, layers: Sequence[str], stats: BatchStats, late: int = 0, fallbacks: Mapping[str, int] | None = None
    ) -> None:
        """Exports the next batch.

        Args:
            layers: Names of the MoE layers.
            stats: What the batch took.
            late: Preparations that were late so far: `Controller.late`.
            fallbacks: Fallbacks so far, by reason: `Controller.fallbacks`.
        """
        if not self._exporters:
            return
        so_far = Counter(dict(fallbacks or {}))
        document: Document = {
            "batch": self._batch,
            "time": time.time(),
            "late": late - self._late,
            "fallbacks": dict(so_far - self._fallbacks),
        } | figures(layers, stats)
        self._batch, self._late, self._fallbacks = self._batch + 1, late, so_far
        for exporter in self._exporters:
            exporter.add(document)
