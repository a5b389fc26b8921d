"""MoELayout: identity and geometry of a model's MoE layers; traces and predictors are checked against it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

Stack = str  # "encoder" or "decoder"


@dataclass(frozen=True)
class MoELayout:
    """Geometry and identity of one Switch Transformer's MoE layers.

    Attributes:
        model_id: Hub id, folder or bundled name, for display; not part of the fingerprint.
        revision: Revision of a hub model, else "".
        layers: (stack, block) of each MoE layer in order of execution, encoder first.
        num_experts: Logical experts of each layer.
        expert_capacity: Most tokens of one sequence that an expert accepts; further tokens are dropped.
        d_model: Width of the hidden states.
        d_ff: Inner width of an expert.
        vocab_size: Rows of the embedding table.
        routers: sha256 of all router weights in bf16; "" if only the configuration is known.
    """

    model_id: str
    revision: str
    layers: tuple[tuple[Stack, int], ...]
    num_experts: int
    expert_capacity: int
    d_model: int
    d_ff: int
    vocab_size: int
    routers: str = ""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError(f"{self.model_id} has no MoE layer; a Switch Transformer with at least one is needed")
        object.__setattr__(self, "layers", tuple((str(stack), int(block)) for stack, block in self.layers))
        if list(self.layers) != sorted(self.layers, key=lambda layer: (layer[0] == "decoder", layer[1])):
            raise ValueError(f"MoE layers {self.layers} are out of order; expected encoder blocks, then decoder blocks")

    @property
    def num_layers(self) -> int:
        """Number of MoE layers, L."""
        return len(self.layers)

    @property
    def num_encoder_layers(self) -> int:
        """Number of the encoder's MoE layers, which come first."""
        return sum(stack == "encoder" for stack, _ in self.layers)

    @property
    def layer_names(self) -> list[str]:
        """Name of each MoE layer, such as `encoder_1`; also its column in a trace."""
        return [f"{stack}_{block}" for stack, block in self.layers]

    @property
    def module_names(self) -> list[str]:
        """Module path of each MoE layer's sparse MLP in the model."""
        return [f"{stack}.block.{block}.layer.{1 if stack == 'encoder' else 2}.mlp" for stack, block in self.layers]

    def fingerprint(self) -> str:
        """Sixteen hex digits, different for models whose routing may differ; name and revision do not count."""
        facts = {key: value for key, value in asdict(self).items() if key not in ("model_id", "revision")}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON document that `from_json` reads."""
        return asdict(self) | {"layers": [list(layer) for layer in self.layers], "fingerprint": self.fingerprint()}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "MoELayout":
        """Reads `to_json`'s document.

        Raises:
            ValueError: If a field is missing or the fingerprint does not match the fields.
        """
        if not isinstance(document, dict):
            raise ValueError(f"not a model layout but a {type(document).__name__}")
        fields = {key: value for key, value in document.items() if key != "fingerprint"}
        try:
            layout = cls(**fields)
        except TypeError as error:
            raise ValueError(f"not a model layout: {error}") from None
        if document.get("fingerprint") != layout.fingerprint():
            raise ValueError(
                f"layout has fingerprint {document.get('fingerprint')}, but its fields give {layout.fingerprint()}; "
                "the file was edited or damaged"
            )
        return layout

    @classmethod
    def from_model(cls, model: nn.Module, model_id: str, revision: str = "") -> "MoELayout":
        """Reads the layout of a live Switch Transformer.

        Raises:
            ValueError: If the model is not a Switch Transformer.
        """
        config: Any = getattr(model, "config", None)
        if getattr(config, "model_type", None) != "switch_transformers":
            found = getattr(config, "model_type", type(model).__name__)
            raise ValueError(f"{model_id} is a {found} model; expected switch_transformers")
        layers, digest = [], hashlib.sha256()
        for name, module in model.named_modules():
            parts = name.split(".")
            if parts[-1] == "router":
                layers.append((parts[0], int(parts[2])))
                weight = module.get_submodule("classifier").get_parameter("weight").detach()
                digest.update(weight.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
        return cls(
            model_id=model_id, revision=revision, layers=tuple(layers), num_experts=config.num_experts,
            expert_capacity=config.expert_capacity, d_model=config.d_model, d_ff=config.d_ff,
            vocab_size=config.vocab_size, routers=digest.hexdigest(),
        )  # fmt: skip
