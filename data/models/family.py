"""Which model families Switchcast takes, read off a configuration; others are refused by name, with the reason."""

from collections.abc import Mapping
from typing import Any

from data.models.layout import SWITCH

OWN_BLOCKS = "its experts are blocks of its own, which compute without the experts interface of transformers"
MOST = {"num_hidden_layers": 2_000, "num_layers": 2_000, "num_decoder_layers": 2_000, "hidden_size": 1 << 20}
"""Largest numbers of a configuration that are taken for a model's; beyond them, building it would never end."""
REFUSED = {
    "llama4": "its router weights scale the input of the experts, not their output",
    "llama4_text": "its router weights scale the input of the experts, not their output",
    "dbrx": OWN_BLOCKS,
    "doge": OWN_BLOCKS,
    "jetmoe": OWN_BLOCKS,
    "longcat_flash": OWN_BLOCKS,
    "step3p7": OWN_BLOCKS,
    "step3p7_text": OWN_BLOCKS,
    "nllb-moe": "transformers itself computes it wrongly, every token by experts 0 and 1 whatever the router chose",
}
"""Families with experts that Switchcast cannot run, and why."""
EXPECTED = f"{SWITCH}, or a decoder-only Mixture of Experts that transformers' AutoModelForCausalLM loads"


def check_family(name: str, config: Mapping[str, Any]) -> None:
    """Refuses a model by its configuration, before anything else of it is read.

    Args:
        name: The model's name, for the error.
        config: Its config.json.

    Raises:
        ValueError: If its family is refused, not decoder-only, or its weights are quantised.
    """
    family = config.get("model_type")
    if not isinstance(family, str):
        raise ValueError(f"{name} has the model_type {family} in its config.json; expected {EXPECTED}")
    if family in REFUSED:
        raise ValueError(f"{name} is a {family} model, which Switchcast cannot run: {REFUSED[family]}")
    for key, most in MOST.items():
        if isinstance(config.get(key), int) and config[key] > most:
            raise ValueError(f"{name} has {key} {config[key]} in its config.json, expected at most {most}")
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise ValueError(
            f"{name} has quantised weights ({method}), and Switchcast's experts compute in float32 or bfloat16; use a "
            "copy of the model without quantization_config"
        )
    if family != SWITCH and not _is_decoder_only(family):
        raise ValueError(f"{name} is a {family} model; expected {EXPECTED}")


def _is_decoder_only(family: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
