"""Exporters of telemetry: a Prometheus endpoint, a file of JSON lines, a Weights & Biases run."""

import json
import os
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

Document = dict[str, Any]
"""One batch, as `runtime.telemetry.recorder.figures` returns it."""
SECONDS = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
SHARES = tuple(tenth / 10 for tenth in range(1, 11))


class Exporter(AbstractContextManager["Exporter", None]):
    """Exports documents until it is closed."""

    @abstractmethod
    def add(self, document: Document) -> None:
        """Exports one batch."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Closes the exporter; `failed` if the run raised."""

    def __exit__(self, kind: object, *error: object) -> None:
        self.close(failed=kind is not None)


class PrometheusEndpoint(Exporter):
    """Serves metrics to a Prometheus scraper, on all interfaces, from a registry of its own.

    Args:
        port: Port to serve; 0 takes any free one.

    Attributes:
        port: The port that is served.

    Raises:
        ValueError: If the port cannot be served.
    """

    def __init__(self, port: int) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"metrics port is {port}; expected 1 to 65535, or 0 for any free one")
        registry = CollectorRegistry()
        try:
            self._server, self._thread = start_http_server(port, registry=registry)
        except OSError as error:
            raise ValueError(f"metrics port {port} cannot be served: {error.strerror}; choose another") from None
        self.port = self._server.server_port
        self._define(registry)

    def _define(self, registry: CollectorRegistry) -> None:
        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"switchcast_{name}", what, labels, registry=registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"switchcast_{name}", what, labels, registry=registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"switchcast_{name}", what, labels, registry=registry, buckets=buckets)

        self._batches = counter("batches", "Batches, by the source of their forecast", "source")
        self._late = counter("late", "Preparations that were not ready at the start of their batch")
        self._fallbacks = counter("fallbacks", "Times past loads or the old plan were used instead, by error", "reason")
        self._compute = histogram("compute_seconds", "Forward of a batch on rank 0", SECONDS)
        self._exposed = histogram("exposed_seconds", "Time rank 0 waited for forecast, plan and copies", SECONDS)
        self._balance = histogram("balancedness", "Mean device load / largest, by batch", SHARES, "layer")
        self._error = histogram("forecast_error", "Total variation distance, by batch", SHARES, "layer")
        self._slowest = histogram("slowest_device_seconds", "Busiest device of a batch", SECONDS, "layer")
        self._tokens = counter("tokens", "Tokens computed on their own rank or sent to another", "layer", "where")
        self._moves = counter("moves", "Experts copied into replica slots", "layer")
        self._bytes = counter("moved_bytes", "Bytes of the experts copied", "layer")
        self._busy = counter("busy_seconds", "Time a device computed experts", "layer", "device")
        self._waited = counter("waited_seconds", "Time a rank waited for other ranks", "layer", "rank")
        self._tier = gauge("tier", "Counters of a tier of rank 0's expert cache", "tier", "figure")
        self._device_tokens = gauge("device_tokens", "Tokens a device computed in the last batch", "layer", "device")

    def add(self, document: Document) -> None:
        """Adds a batch to the metrics."""
        self._batches.labels(document["source"]).inc()
        self._late.inc(document["late"])
        for reason, times in document["fallbacks"].items():  # a label per message would grow without bound
            self._fallbacks.labels(reason.partition(":")[0]).inc(times)
        if document["compute_ms"] is not None:
            self._compute.observe(document["compute_ms"] / 1e3)
        self._exposed.observe(document["exposed_ms"] / 1e3)
        for tier, counters in document["tiers"].items():
            for name, value in counters.items():
                self._tier.labels(tier, name).set(value)
        for figures in document["layers"]:
            layer = figures["layer"]
            if figures["balancedness"] is not None:
                self._balance.labels(layer).observe(figures["balancedness"])
            if figures["load_tv"] is not None:
                self._error.labels(layer).observe(figures["load_tv"])
            self._tokens.labels(layer, "local").inc(figures["tokens_local"])
            self._tokens.labels(layer, "sent").inc(figures["tokens_sent"])
            self._moves.labels(layer).inc(figures["moves"])
            self._bytes.labels(layer).inc(figures["bytes"])
            for device, tokens in enumerate(figures["device_tokens"]):
                self._device_tokens.labels(layer, device).set(tokens)
            if document["compute_ms"] is not None:
                self._add_times(layer, figures)

    def _add_times(self, layer: str, figures: Document) -> None:
        self._slowest.labels(layer).observe(max(figures["busy_ms"]) / 1e3)
        for device, ms in enumerate(figures["busy_ms"]):
            self._busy.labels(layer, device).inc(ms / 1e3)
        for rank, ms in enumerate(figures["waited_ms"]):
            self._waited.labels(layer, rank).inc(ms / 1e3)

    def close(self, failed: bool) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class JsonLines(Exporter):
    """Appends one line for each batch; a line is written whole or not at all.

    Args:
        path: The file; an existing one is continued.

    Raises:
        ValueError: If the file cannot be written, or ends in the middle of a line.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._new = path, not path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
            raise ValueError(f"metrics file {path} cannot be written ({reason}); choose another") from None
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.close(self._file)
            raise ValueError(f"metrics file {path} ends in the middle of a line; choose another, or remove it")

    def add(self, document: Document) -> None:
        """Writes a line.

        Raises:
            OSError: If the disk is full; no part of the line is then left.
        """
        line = json.dumps(document).encode() + b"\n"
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
        except OSError as error:
            raise OSError(error.errno, f"metrics file {self._path} cannot be written: {error.strerror}") from None
        if written < len(line):
            os.ftruncate(self._file, size)
            raise OSError(f"metrics file {self._path} has no room for another line; make room, or choose another")

    def close(self, failed: bool) -> None:
        """Closes the file, and removes it if nothing was written."""
        if self._new and os.fstat(self._file).st_size == 0:  # nothing ran
            self._path.unlink()
        os.close(self._file)


class WandbRun(Exporter):
    """A run in Weights & Biases; each step is a batch.

    Args:
        project: The run's project.
        folder: Folder that holds its `wandb` folder.
        settings: The run's configuration.

    Raises:
        ValueError: If W&B does not start.
    """

    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run: Any = wandb.init(project=project, job_type="infer", dir=folder, config=dict(settings))
        except wandb.Error as error:
            raise ValueError(f"W&B did not start ({error}); log in, or set WANDB_MODE=offline") from None

    def add(self, document: Document) -> None:
        """Logs a batch: its own figures by name, a layer's as `encoder_1/moves`, lists by their largest entry.

        Fallbacks are logged as their number and, if there were any, their reasons as `fallback_reason`.
        """
        nested = ("batch", "time", "layers", "fallbacks", "tiers")
        row = {name: value for name, value in document.items() if name not in nested}
        for tier, counters in document["tiers"].items():
            row |= {f"{tier}/{name}": value for name, value in counters.items()}
        row["fallbacks"] = sum(document["fallbacks"].values())
        row["fallback_reason"] = "; ".join(document["fallbacks"]) or None
        for figures in document["layers"]:
            for name, value in figures.items():
                row[f"{figures['layer']}/{name}"] = max(value) if isinstance(value, list) else value
            del row[f"{figures['layer']}/layer"]
        self._run.log({name: value for name, value in row.items() if value is not None}, step=document["batch"])

    def close(self, failed: bool) -> None:
        """Ends the run."""
        self._run.finish(exit_code=int(failed))
