"""Job: one recording and the settings that it is replayed with; `run` gives the report."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from data.files import code_digest
from data.models.layout import MoELayout
from data.traces.load_stream import LoadStream, open_stream
from data.traces.recordings import TRACE_JSON
from data.traces.store import open_trace
from runtime.gpu.devices import gpu_device
from runtime.simulate.comparison import PLANNERS, RENEW_EVERY, compare_policies, expert_bytes_of
from runtime.simulate.cost_model import DeviceTimes, Hardware, measure
from runtime.simulate.gpu_cost import gpu_times
from runtime.simulate.replay import SPLITS
from runtime.simulate.serving import Order, Serve, served

NODE_LINK = "node_link_bytes_per_second"
SPEEDS = ("tokens_per_second", "link_bytes_per_second", "expert_overhead_tokens")
SIZES = ("like", "precision", "hidden_size", "intermediate_size", "top_k")

LEAST = {"devices": 1, "redundant": 0, "max_moves": 0, "renew_every": 1}
"""Smallest values that mean something for any recording."""


@dataclass(frozen=True)
class Job:
    """One simulation; the fields are the options of `runtime.simulate.__main__.simulate`, which explains them."""

    loads: Path
    devices: int = 8
    redundant: int = 16
    forecast: str | None = None
    planner: str = ",".join(PLANNERS)
    split: str = ",".join(SPLITS)
    predictor: Path | None = None
    start: int = 1
    steps: int | None = None
    max_moves: int | None = None
    devices_per_node: int | None = None
    groups: int | None = None
    expert_bytes: float | None = None
    tokens_per_second: float | None = None
    link_bytes_per_second: float | None = None
    node_link_bytes_per_second: float | None = None
    expert_overhead_tokens: float | None = None
    gpu: str | None = None
    like: str | None = None
    precision: str | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    top_k: int | None = None
    tokens_per_step: float | None = None
    renew_every: int = RENEW_EVERY
    serve: Serve | None = None
    slots: int | None = None
    chunk: int | None = None
    order: Order = "subject"
    stream: str = "test"

    def __post_init__(self) -> None:
        of_serving = {
            "slots": self.slots, "chunk": self.chunk, "order": self.order != "subject" or None,
            "stream": self.stream != "test" or None,
        }  # fmt: skip
        if self.serve is None and (unused := [name for name, value in of_serving.items() if value is not None]):
            raise ValueError(f"--{unused[0]} is for --serve prefill or --serve decode; add that, or leave it out")
        for name, least in LEAST.items():
            if (value := getattr(self, name)) is not None and not value >= least:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {least} or more")
        if self.gpu is not None:
            gpu_device(self.gpu)
        speeds = ("expert_bytes", *SPEEDS, NODE_LINK)
        if self.gpu is not None and any(getattr(self, name) is not None for name in speeds):
            raise ValueError("--gpu takes speeds from measured tables; leave out --expert-bytes and the other speeds")
        if (link := self.node_link_bytes_per_second) is not None and self.devices_per_node is None:
            raise ValueError("--node-link-bytes-per-second is for several nodes; add --devices-per-node")
        if link is not None and not 1 <= link < float("inf"):
            raise ValueError(f"--node-link-bytes-per-second is {link}, expected a finite number, 1 or more")
        if self.gpu is None and any(getattr(self, name) is not None for name in SIZES):
            raise ValueError("--like, --precision and sizes of experts are for --gpu; add that, or leave them out")

    @property
    def identity(self) -> str:
        """Digest of the settings, of names, sizes and times of the files that are read, and of the code."""
        files = [path for place in (self.loads, self.predictor) if place for path in _files(place)]
        facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.exists()]
        text = json.dumps([asdict(self), facts, code_digest()], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def run(
        self, out: Path | None = None, save_plans: Path | None = None, console: Console | None = None
    ) -> dict[str, Any]:
        """Replays the recording; arguments and report are those of `compare_policies`.

        Raises:
            ValueError: If the recording cannot be read, or settings do not fit it.
        """
        stream, start = self._stream()
        return compare_policies(
            stream, self.devices, self.redundant, self.forecast.split(",") if self.forecast else None,
            self.planner.split(","), self.split.split(","), self.predictor, start, self.steps,
            self._hardware(stream), self.max_moves, self.devices_per_node, self.tokens_per_step, self.renew_every,
            num_groups=self.groups, out=out, save_plans=save_plans, console=console,
        )  # fmt: skip

    def _stream(self) -> tuple[LoadStream, int]:
        """The recording, and the first step that is planned."""
        if self.serve is None:
            return open_stream(self.loads), self.start
        recorded, first = served(self.loads, self.serve, self.slots, self.chunk, self.order, self.stream)
        return LoadStream.of(recorded), max(self.start, first)

    def _hardware(self, stream: LoadStream) -> DeviceTimes:
        """A GPU of the tables, or speeds."""
        if self.gpu is not None:
            return gpu_times(self.gpu, stream, *(getattr(self, name) for name in SIZES))
        job = self.with_speeds()
        return Hardware(job.expert_bytes or 0.0, *(getattr(job, name) for name in (*SPEEDS, NODE_LINK)))

    def with_speeds(self) -> "Job":
        """The job with the bytes of an expert, and with speeds of this machine where none were given and needed.

        Raises:
            ValueError: If the trace cannot be opened.
        """
        if self.gpu is not None:
            return self
        nbytes = expert_bytes_of(_layout(self.loads)) if self.expert_bytes is None else self.expert_bytes
        given = {name: getattr(self, name) for name in SPEEDS}
        if None in given.values():
            here = _measured(nbytes)
            speeds = (here.tokens_per_second, here.bytes_per_second, here.expert_overhead_tokens)
            given = {
                name: speed if given[name] is None else given[name] for name, speed in zip(SPEEDS, speeds, strict=True)
            }
        return replace(self, expert_bytes=nbytes, **given)


@cache
def _measured(expert_bytes: float) -> Hardware:
    return measure(expert_bytes)


def _layout(loads: Path) -> MoELayout | None:
    """The layout of a trace of tokens; other recordings do not know the sizes of experts."""
    if not (loads / TRACE_JSON).exists():
        return None
    trace = open_trace(loads)
    return trace.layout if trace.about["granularity"] == "tokens" else None


def _files(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
