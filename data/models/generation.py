"""GenerationSettings: which settings hold in a call of `generate`, resolved as transformers resolves them."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

GREEDY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "use_cache": True,
    "prompt_lookup_num_tokens": None, "prefill_chunk_size": None, "guidance_scale": None, "stop_strings": None,
    "max_time": None,
}  # fmt: skip
"""Settings of `generate` for one text a sequence, one token a step, and one call of the model a step.

A model's own generation_config may say otherwise; a setting given by name wins, None too.
"""


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of a call of `generate` that decide how its rows are to be read.

    Attributes:
        ends: Token ids that end a sequence.
        stepwise: Whether a row of the decoder stays one sequence and its last token is final; not so with beams or
            with candidates of an assistant model or a prompt lookup.
        sequences_each: Texts written for each sequence.
        pad: Id that is padding wherever no attention mask is given; None takes every position for a token.
        samples: Whether tokens are drawn.
    """

    ends: tuple[int, ...]
    stepwise: bool
    sequences_each: int
    pad: int | None
    samples: bool

    @classmethod
    def of(cls, model: Any, generation_config: Any, settings: dict[str, Any]) -> "GenerationSettings":
        """Resolves settings in the order that transformers does: keyword, then object, then the model's own.

        A keyword holds even if it is None; None in the object leaves the choice to the model.

        Raises:
            TypeError: If the object is of another class.
            ValueError: If something else than token ids is asked for, or settings exclude each other.
        """
        from transformers import GenerationConfig

        if generation_config is not None and not isinstance(generation_config, GenerationConfig):
            raise TypeError(
                f"generation_config is a {type(generation_config).__name__}, expected a GenerationConfig of "
                "transformers; single settings are given by name"
            )
        resolved: Any = GenerationConfig() if generation_config is None else deepcopy(generation_config)
        resolved.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        resolved.update(**settings)
        if resolved.return_dict_in_generate:
            raise ValueError("return_dict_in_generate is True; the engine returns token ids alone, leave it out")
        candidates = settings.get("assistant_model") is not None or resolved.prompt_lookup_num_tokens is not None
        stepwise = (resolved.num_beams or 1) == 1 and not candidates
        ends = tuple(token_ids(resolved.eos_token_id))
        pad = None if model.config.is_encoder_decoder else resolved.pad_token_id
        pad = None if pad is None or int(pad) in ends else int(pad)  # as transformers tells padding from the end
        return cls(ends, stepwise, resolved.num_return_sequences or 1, pad, bool(resolved.do_sample))


def token_ids(given: Any) -> list[int]:
    """Token ids as configurations hold them: None, one, a list, or a tensor."""
    ids: list[int] = torch.as_tensor([] if given is None else given).flatten().long().tolist()
    return ids


def padding_id(config: Any) -> int:
    """Id at padded positions: the model's, or 0 if its configuration names none."""
    return 0 if config.pad_token_id is None else int(config.pad_token_id)


def start_id(config: Any) -> int:
    """Id of the token that a decoder beside an encoder is fed first: the model's, or that of padding."""
    start = config.decoder_start_token_id
    return padding_id(config) if start is None else int(start)
