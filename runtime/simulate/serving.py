"""A trace's requests served again as steps to simulate: prefill or decode, with any number of slots.

    recorded, start = served("outputs/traces/gpt-oss", "decode", slots=32)

Training requests come first, as history; the requests of the stream are planned from step `start` on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from data.models.layout import MoELayout
from data.traces.dataset import sequence_loads
from data.traces.loads import RecordedLoads
from data.traces.requests import RecordedRequest, ordered, requests_of, serve, step_trace
from data.traces.store import open_trace
from data.traces.trace import RouterTrace

Serve = Literal["prefill", "decode"]
Order = Literal["subject", "shuffled"]
SLOTS = {"prefill": 4, "decode": 32}
CHUNK = {"prefill": 128, "decode": 1}
WARM_UP = 256
"""Most steps of training requests before the first step that is planned."""


def served(
    path: Path | str,
    kind: Serve,
    slots: int | None = None,
    chunk: int | None = None,
    order: Order = "subject",
    stream: str = "test",
) -> tuple[RecordedLoads, int]:
    """Serves the requests of a trace; returns the recorded steps and the number of the first one of the stream.

    Args:
        path: Folder of a token trace with requests.
        kind: "prefill" computes chunks whose tokens are known ahead; "decode" one token of each request, which is not.
        slots: Requests in a step; by default 4 for prefill and 32 for decode.
        chunk: Most tokens of a request in a prefill step; by default 128.
        order: "subject" takes requests subject after subject, "shuffled" in a random order.
        stream: "test" takes the requests of the test split, a phase such as "unseen" the test requests of that phase,
            "all" every request, without training requests before them.

    Raises:
        ValueError: If the folder holds no such trace, or the stream no requests.
    """
    if kind == "decode" and chunk not in (None, 1):
        raise ValueError(f"chunk is {chunk}, but a decode step computes one token of each request; leave it out")
    trace = open_trace(path)
    requests = requests_of(trace)
    chosen = [request for request in requests if stream in ("all", request.phase) or request.split == stream]
    if stream != "all":
        chosen = [request for request in chosen if request.split == "test"]
    if not chosen:
        phases = sorted({request.phase for request in requests if request.split == "test"})
        raise ValueError(f"stream '{stream}' has no requests in {path}; expected test, all, or {', '.join(phases)}")
    earlier = [request for request in requests if request.split == "train"] if stream != "all" else []
    sizes = SLOTS[kind] if slots is None else slots, CHUNK[kind] if chunk is None else chunk
    before = list(_steps(ordered(earlier, order), *sizes))[-WARM_UP:]
    steps = [*before, *_steps(ordered(chosen, order), *sizes)]
    return _recorded(str(path), trace.layout, steps, kind), max(len(before), 1)


def _steps(requests: list[RecordedRequest], slots: int, chunk: int) -> Iterator[RouterTrace]:
    return (step_trace(number, step) for number, step in enumerate(serve(requests, slots, chunk)))


def _recorded(name: str, layout: MoELayout, steps: list[RouterTrace], kind: Serve) -> RecordedLoads:
    by_sequence = [sequence_loads(step, layout).numpy() for step in steps]
    return RecordedLoads(
        name,
        np.stack([loads.sum(0) for loads in by_sequence]),
        [step.tokens.unwritten() if kind == "decode" else step.tokens for step in steps],
        layout,
        [loads.astype(np.int32) for loads in by_sequence],
    )
