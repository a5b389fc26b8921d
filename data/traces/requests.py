"""Recorded requests served again: continuous batching over slots turns them into steps, each a RouterTrace.

    requests = requests_of(open_trace("outputs/traces/gpt-oss"))
    for step in serve(requests, slots=32, chunk=1):      # decode: one token of each request in a step
        ...

Shape suffixes: N tokens of a request, R routed tokens, B slots in use, K experts of a token, L MoE layers.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.arrays import IntArray
from data.traces.store import StoredTrace
from data.traces.trace import PADDING, RouterTrace, TokenBatch, pad_tokens

Experts = npt.NDArray[np.int16]
CONTEXT = 128
"""Most tokens before a chunk that a step keeps as its context."""


@dataclass(frozen=True)
class RecordedRequest:
    """One request: its tokens and the experts of those that were routed.

    Attributes:
        number: Number of the request.
        segment: Its subject.
        phase: Part of the stream that it belongs to.
        split: "train", "gap", "val" or "test".
        tokens: Token ids of prompt and answer, `[N]`.
        first_routed: Position of the first token whose experts are known; tokens before it are context.
        experts: Experts of the routed tokens, likeliest first, int16 `[R, L, K]`.
    """

    number: int
    segment: str
    phase: str
    split: str
    tokens: IntArray
    first_routed: int
    experts: Experts

    def __post_init__(self) -> None:
        if self.first_routed + len(self.experts) > len(self.tokens):
            raise ValueError(
                f"request {self.number} has {len(self.tokens)} tokens, but routes up to token "
                f"{self.first_routed + len(self.experts)}"
            )


class Chunk(NamedTuple):
    """Routed tokens `start` to `stop - 1` of a request, counted from its first routed token."""

    request: RecordedRequest
    start: int
    stop: int


def check_serving(slots: int, chunk: int) -> None:
    """Checks the numbers of `serve`.

    Raises:
        ValueError: Naming a number below 1.
    """
    for name, value in (("slots", slots), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected 1 or more")


def serve(requests: Iterable[RecordedRequest], slots: int, chunk: int) -> Iterator[list[Chunk]]:
    """Yields the chunks of each step: every slot computes up to `chunk` tokens of its request.

    Requests take the slots in their order; a slot whose request has ended takes the next one. Requests of 3 and 5
    tokens in two slots with chunks of 2 make the steps [2, 2], [1, 2], [1].
    """
    check_serving(slots, chunk)
    waiting = deque(request for request in requests if len(request.experts))
    places: list[tuple[RecordedRequest, int] | None] = [None] * min(slots, len(waiting))
    while waiting or any(places):
        step = []
        for place, taken in enumerate(places):
            if taken is None and not waiting:
                continue
            request, start = taken or (waiting.popleft(), 0)
            stop = min(start + chunk, len(request.experts))
            step.append(Chunk(request, start, stop))
            places[place] = (request, stop) if stop < len(request.experts) else None
        yield step


def ordered(requests: list[RecordedRequest], order: str, seed: int = 0) -> list[RecordedRequest]:
    """The requests subject after subject ("subject", subjects as they first appear) or "shuffled".

    Raises:
        ValueError: If `order` is another word.
    """
    if order == "subject":
        first: dict[str, int] = {}
        return sorted(requests, key=lambda request: first.setdefault(request.segment, len(first)))
    if order == "shuffled":
        return [requests[index] for index in np.random.default_rng(seed).permutation(len(requests))]
    raise ValueError(f"order is '{order}', expected subject or shuffled")


def step_trace(number: int, step: list[Chunk], context: int = CONTEXT) -> RouterTrace:
    """One step as a batch: a sequence for each chunk, with up to `context` tokens before it."""
    rows, before, routes = [], [], []
    for request, start, stop in step:
        first = request.first_routed + start
        known = max(first - context, 0)
        rows.append(request.tokens[known : request.first_routed + stop])
        before.append(first - known)
        routes.append(request.experts[start:stop])
    tokens = pad_tokens(rows, 0)
    is_context = torch.arange(tokens.mask.shape[1]) < torch.tensor(before)[:, None]
    numbers = torch.tensor([chunk.request.number for chunk in step])
    tokens = TokenBatch(tokens.input_ids, tokens.mask, is_context if is_context.any() else None, numbers)
    experts = torch.full((*tokens.mask.shape, *routes[0].shape[1:]), PADDING, dtype=torch.int16)
    experts[tokens.computed] = torch.from_numpy(np.concatenate(routes))
    experts = experts.permute(2, 0, 1, 3).contiguous()
    request = step[0].request
    return RouterTrace(
        number, request.phase, request.split, tuple(chunk.request.segment for chunk in step), tokens,
        TokenBatch(tokens.input_ids[:, :0], tokens.mask[:, :0]), experts,
        experts.new_zeros(0, len(step), 0, experts.shape[-1]),
    )  # fmt: skip


def requests_of(trace: StoredTrace) -> list[RecordedRequest]:
    """The requests of a trace, put together from its batches, in the order in which they began.

    Raises:
        ValueError: If the trace is not of a decoder-only model, or does not say which request a sequence belongs to.
    """
    if not trace.layout.causal:
        raise ValueError(f"{trace.path} is a trace of an encoder; only a decoder-only model's requests can be served")
    pieces: dict[int, list[tuple[RouterTrace, int]]] = {}
    for batch in trace.traces():
        if batch.requests is None:
            raise ValueError(f"{trace.path} does not say which request a sequence belongs to; convert or collect again")
        for row, request in enumerate(batch.requests.tolist()):
            pieces.setdefault(request, []).append((batch, row))
    return [_request(number, found) for number, found in pieces.items()]


def _request(number: int, pieces: list[tuple[RouterTrace, int]]) -> RecordedRequest:
    (first, row), tokens, experts = pieces[0], [], []
    before = first.tokens.input_ids[row][first.tokens.mask[row] & ~first.tokens.computed[row]]
    for batch, place in pieces:
        computed: Tensor = batch.tokens.computed[place]
        tokens.append(batch.tokens.input_ids[place][computed])
        experts.append(batch.experts[:, place, computed].transpose(0, 1))
    facts: dict[str, Any] = {"phase": first.phase, "split": first.split}
    return RecordedRequest(
        number, first.segments[row], tokens=torch.cat([before, *tokens]).numpy(), first_routed=len(before),
        experts=torch.cat(experts).numpy(), **facts,
    )  # fmt: skip
