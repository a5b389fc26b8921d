"""DecoderSteps: follows a decoder that writes token by token: which sequences are done, when placement may change."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.engine.controller import Controller
from runtime.experts.layer import ReplicatedExperts


class DecoderSteps:
    """A context around a model's `generate`.

    Tokens of finished sequences neither travel nor compute; nobody reads what comes of them. Every `replan_every`
    steps, which all ranks take together, the loads of these steps join the history, what was prepared comes in force,
    and the next placement is prepared from the history.

    Args:
        model: The model.
        layers: All its MoE layers.
        encoder_layers: How many of them are the encoder's.
        controller: What prepares placements.
        replan_every: Decoder steps between two placements; None leaves the placement as it is.
        idle: Whether this rank has no sequence of its own.
        settings: What the model's `generate` is given.

    Raises:
        ValueError: If `replan_every` is less than a step.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[ReplicatedExperts],
        encoder_layers: int,
        controller: Controller,
        replan_every: int | None,
        idle: bool,
        settings: dict[str, Any],
    ) -> None:
        if replan_every is not None and replan_every < 1:
            raise ValueError(f"replan_every is {replan_every}, expected 1 or more decoder steps, or None")
        self._decoder, self._layers, self._written = model.decoder, layers, layers[encoder_layers:]
        self._controller, self._replan_every, self._idle = controller, replan_every, idle
        ends = settings.get("eos_token_id", model.generation_config.eos_token_id)
        self._ends = torch.as_tensor([] if ends is None else ends, dtype=torch.int64).flatten()
        # with beams, rows of the decoder become other sequences from step to step
        self._each_row = (settings.get("num_beams", model.generation_config.num_beams) or 1) == 1
        self._done: Tensor | None = None
        self._step = 0

    def __enter__(self) -> "DecoderSteps":
        self._handle: Any = self._decoder.register_forward_pre_hook(self._before, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()
        if kind is None:
            self._observe()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._replan_every is not None and self._step and self._step % self._replan_every == 0:
            self._observe()
            self._controller.commit()
            for experts, phy2log in zip(self._layers, self._controller.transfer.plan.phy2log, strict=True):
                experts.change_plan(phy2log)
            self._controller.prepare(None)
        ids = kwargs["input_ids"]
        if self._done is None:
            self._done = torch.full((len(ids),), self._idle, device=ids.device)
        elif self._each_row:  # a sequence is done once the token it is fed is one that ends it
            self._done = self._done | torch.isin(ids[:, -1], self._ends.to(ids.device))
        needed = (~self._done)[:, None].expand(ids.shape).reshape(-1)
        for experts in self._written:
            experts.begin_step(needed)
        self._step += 1

    def _observe(self) -> None:
        """Adds the loads since the last call to the history: the decoder's of these steps beside the encoder's."""
        self._controller.observe(np.stack([experts.load for experts in self._layers]))
        for experts in self._written:
            experts.reset_counters()


def sequences_each(settings: dict[str, Any], config: Any) -> int:
    """How many texts `generate` writes for each sequence.

    Raises:
        ValueError: If something else than token ids is asked for.
    """
    if settings.get("return_dict_in_generate", config.return_dict_in_generate):
        raise ValueError("return_dict_in_generate is True; the engine gives token ids alone, leave it out")
    return int(settings.get("num_return_sequences", config.num_return_sequences) or 1)


def ended(ids: Tensor, scores: Tensor, **settings: Any) -> Tensor:
    """A stopping criterion for a rank without a sequence of its own: it is done from the start."""
    return torch.ones(len(ids), dtype=torch.bool, device=ids.device)
