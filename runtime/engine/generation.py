"""Generation token by token: which sequences have ended, and when the placement may change."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.arguments import check_whole
from data.models.generation import GenerationSettings
from data.traces.trace import TokenBatch
from runtime.distributed.device import to_device
from runtime.engine.controller import Controller
from runtime.engine.model import ReplicatedModel

TOKEN_INPUTS = ("input_ids", "inputs", "attention_mask")


@contextmanager
def draws_of(rank: int, world: int, device: torch.device) -> Iterator[None]:
    """A context in which each of several ranks draws on its own, even if all were seeded alike."""
    if world == 1:
        yield
        return
    seed = int(torch.randint(2**48, ()))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + rank)
        yield


def generation_tokens(inputs: Any, settings: dict[str, Any], pad: int | None) -> TokenBatch:
    """The tokens that `generate` is given in any of its ways; takes them out of `settings`.

    Further entries of a mapping, such as `decoder_input_ids`, join the settings. Without an attention mask, positions
    with the id `pad` are padding, as in transformers.

    Raises:
        TypeError: If they are none.
        ValueError: If they are given twice or not at all.
    """
    named = {name: settings.pop(name) for name in TOKEN_INPUTS if settings.get(name) is not None}
    ids = [value for name, value in named.items() if name != "attention_mask"]
    if (given := len(ids) + (inputs is not None)) != 1:
        raise ValueError(f"{given} inputs were given, expected input_ids once (inputs_embeds are not supported)")
    if isinstance(inputs, TokenBatch):
        if "attention_mask" in named:
            raise ValueError("attention_mask was given beside a TokenBatch, which has a mask of its own; leave one out")
        return inputs
    tokens: Any = {"input_ids": ids[0] if ids else inputs, "attention_mask": named.get("attention_mask")}
    if isinstance(inputs, Mapping):
        settings |= {name: value for name, value in inputs.items() if name not in TOKEN_INPUTS}
        tokens = dict(inputs) | named
    elif not ids and not isinstance(inputs, Tensor | np.ndarray):
        return TokenBatch.of(inputs)
    batch = TokenBatch.of(tokens)
    if pad is not None and tokens.get("attention_mask") is None:
        batch = TokenBatch(batch.input_ids, batch.input_ids != pad)
    return batch


class DecoderSteps:
    """A context around a model's `generate`.

    Tokens of sequences that have ended are neither sent nor computed, because nothing reads their states. Every
    `replan_every` steps, which all ranks count alike, three things happen: the loads of these steps join the history,
    the placement that was prepared becomes active, and the next one is prepared from the history.

    Args:
        replicated: The model.
        controller: Prepares placements.
        replan_every: Decoder steps between two placements; None keeps the placement.
        idle: Whether this rank has no sequence of its own.
        settings: Of the call.
        prompt: Tokens of each sequence, padding included, that the stepping module is fed before it writes; 0 for a
            decoder beside an encoder, whose first call is fed nothing written.

    Raises:
        ValueError: If `replan_every` is no whole number of steps.
    """

    def __init__(
        self,
        replicated: ReplicatedModel,
        controller: Controller,
        replan_every: int | None,
        idle: bool,
        settings: GenerationSettings,
        prompt: int,
    ) -> None:
        if replan_every is not None:
            check_whole("replan_every", replan_every, 1)
        self._replicated, self._controller, self._replan_every, self._idle = replicated, controller, replan_every, idle
        device = replicated.loaded.model.device
        self._ends = to_device(torch.tensor(settings.ends, dtype=torch.int64), device)
        self._each_row = settings.stepwise
        self._ended: Tensor | None = None
        self._step, self._prompt, self._fed = 0, prompt, 0

    def __enter__(self) -> "DecoderSteps":
        stepper = self._replicated.adapter.stepper
        self._handle: Any = stepper.register_forward_pre_hook(self._before_step, with_kwargs=True)
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._handle.remove()
        if kind is None:
            self._observe()

    def _before_step(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._replan_every is not None and self._step and self._step % self._replan_every == 0:
            self._observe()
            self._controller.commit()
            self._replicated.follow_plan()
            self._controller.prepare(None)
        ids = kwargs["input_ids"]
        if self._ended is None:
            self._ended = torch.full((len(ids),), self._idle, device=ids.device)
        elif self._each_row and max(self._fed, ids.shape[1] - 1) >= self._prompt:  # else it reads a prompt in pieces
            # a sequence has ended once the token that is fed is one that ends it
            self._ended = self._ended | torch.isin(ids[:, -1], self._ends)
        self._fed += ids.shape[1]
        skipped = self._ended[:, None].expand(ids.shape)
        needed = self._replicated.adapter.step_needs(ids, kwargs.get("attention_mask"))
        skipped_T = (skipped if needed is None else skipped | ~needed).reshape(-1)
        for experts in self._replicated.step_layers:
            experts.begin_step(skipped_T)
        if self._replicated.probes is not None:
            self._replicated.probes.begin_step(ids, self._ended)
        self._step += 1

    def _observe(self) -> None:
        """Adds the loads since the last call to the history: an encoder's beside the decoder's of these steps."""
        if self._replicated.places:
            self._controller.observe(np.stack([experts.counters.load for experts in self._replicated.layers]))
        for experts in self._replicated.step_layers:
            experts.reset_counters()


def ended(ids: Tensor, scores: Tensor, **settings: Any) -> Tensor:
    """A stopping criterion for a rank without a sequence of its own: it has ended from the start."""
    return torch.ones(len(ids), dtype=torch.bool, device=ids.device)
