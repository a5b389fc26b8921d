"""MoELayout: identity and geometry of a model's MoE layers; traces and predictors are checked against it."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from data.arrays import MOST_EXPERTS
from data.errors import shown

Stack = str  # "encoder" or "decoder"
SWITCH = "switch_transformers"
SAMPLE = 4096
"""Most values of a tensor that the digest of the dense weights takes."""
NOT_IDENTITY = ("model_id", "revision")
ADDED = {"family": SWITCH, "experts_per_token": 1, "causal": False, "dense": ""}
"""Fields that older layouts lack, with the values that those had; at these values they are left out."""


@dataclass(frozen=True)
class MoELayout:
    """Geometry and identity of one model's MoE layers.

    Attributes:
        model_id: Hub id, folder or bundled name, for display; not part of the fingerprint.
        revision: Revision of a hub model, else "".
        layers: (stack, block) of each MoE layer in order of execution, encoder first; dense layers count as blocks.
        num_experts: Logical experts of each layer, E.
        expert_capacity: Most tokens of one sequence that an expert accepts; further tokens are dropped. None sets no
            limit.
        d_model: Width of the hidden states.
        d_ff: Inner width of an expert.
        vocab_size: Rows of the embedding table.
        routers: sha256 of all router weights and biases in bf16; "" if only the configuration is known.
        family: The configuration's `model_type`.
        experts_per_token: Experts that a router chooses for each token, K.
        causal: Whether the model is decoder-only: all layers route the batch's own tokens, which are known ahead.
        modules: Module path of each MoE layer's experts; not part of the fingerprint.
        dense: sha256 of a sample of all other weights but the experts' and the head's, see `digest_of_dense`: what the
            routers are given depends on them. "" if it is unknown, as in layouts of earlier versions.
    """

    model_id: str
    revision: str
    layers: tuple[tuple[Stack, int], ...]
    num_experts: int
    expert_capacity: int | None
    d_model: int
    d_ff: int
    vocab_size: int
    routers: str = ""
    family: str = SWITCH
    experts_per_token: int = 1
    causal: bool = False
    modules: tuple[str, ...] = ()
    dense: str = ""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError(f"{self.model_id} has no MoE layer; a model with at least one is needed")
        if not 1 <= self.num_experts <= MOST_EXPERTS:
            raise ValueError(f"{self.model_id} has {self.num_experts} experts a layer, expected 1 to {MOST_EXPERTS}")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"{self.model_id} sends a token to {self.experts_per_token} of {self.num_experts} experts; expected 1 "
                "to all of them"
            )
        object.__setattr__(self, "layers", tuple((str(stack), int(block)) for stack, block in self.layers))
        if list(self.layers) != sorted(self.layers, key=lambda layer: (layer[0] == "decoder", layer[1])):
            raise ValueError(f"MoE layers {self.layers} are out of order; expected encoder blocks, then decoder blocks")
        if self.family == SWITCH and not self.modules:
            names = (
                f"{stack}.block.{block}.layer.{1 if stack == 'encoder' else 2}.mlp" for stack, block in self.layers
            )
            object.__setattr__(self, "modules", tuple(f"{name}.experts" for name in names))
        object.__setattr__(self, "modules", tuple(self.modules))

    @property
    def num_layers(self) -> int:
        """Number of MoE layers, L."""
        return len(self.layers)

    @property
    def num_input_layers(self) -> int:
        """Number of MoE layers that route the batch's input tokens, which are known ahead; they come first.

        The encoder's layers, or all layers of a decoder-only model.
        """
        return self.num_layers if self.causal else sum(stack == "encoder" for stack, _ in self.layers)

    @property
    def layer_names(self) -> list[str]:
        """Name of each MoE layer, such as `encoder_1`; also its column in a trace."""
        return [f"{stack}_{block}" for stack, block in self.layers]

    def fingerprint(self) -> str:
        """Sixteen hex digits, different for models whose routing may differ; name and revision do not count.

        Not seen are: weights of experts, differences lost in bf16, single values outside of the sample of a large
        tensor, and settings of the configuration beside the geometry.
        """
        facts = {key: value for key, value in self._facts().items() if key not in NOT_IDENTITY}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def is_same(self, other: "MoELayout") -> bool:
        """Whether both are of one model: equal fingerprints, but for `dense` where one of them does not know it."""
        if self.dense and other.dense:
            return self.fingerprint() == other.fingerprint()
        return replace(self, dense="").fingerprint() == replace(other, dense="").fingerprint()

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON document that `from_json` reads."""
        facts = self._facts() | {"layers": [list(layer) for layer in self.layers], "fingerprint": self.fingerprint()}
        return facts if self.family == SWITCH else facts | {"modules": list(self.modules)}

    def _facts(self) -> dict[str, Any]:
        """The fields, without those that older layouts lack where their value is the older ones'."""
        fields = {key: value for key, value in asdict(self).items() if key != "modules"}
        return {key: value for key, value in fields.items() if not (key in ADDED and value == ADDED[key])}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "MoELayout":
        """Reads `to_json`'s document.

        Raises:
            ValueError: If a field is missing or the fingerprint does not match the fields.
        """
        if not isinstance(document, dict):
            raise ValueError(f"not a model layout but {shown(document)}")
        fields = {key: value for key, value in document.items() if key != "fingerprint"}
        try:
            layout = cls(**fields)
        except (TypeError, OverflowError) as error:
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
        if getattr(config, "model_type", None) != SWITCH:
            found = getattr(config, "model_type", type(model).__name__)
            raise ValueError(f"{model_id} is a {found} model; expected {SWITCH}")
        layers, routers = [], []
        for name, module in model.named_modules():
            parts = name.split(".")
            if parts[-1] == "router":
                layers.append((parts[0], int(parts[2])))
                routers += module.get_submodule("classifier").parameters()
        layout = cls(
            model_id=model_id, revision=revision, layers=tuple(layers), num_experts=config.num_experts,
            expert_capacity=config.expert_capacity, d_model=config.d_model, d_ff=config.d_ff,
            vocab_size=config.vocab_size, routers=digest_of(routers),
        )  # fmt: skip
        return replace(layout, dense=digest_of_dense(model, layout.modules))


def digest_of_dense(model: Any, experts: Iterable[str]) -> str:
    """Digest of a sample of the weights that decide what routers are given: embeddings, attention, norms, dense layers.

    Of each tensor it takes all values, or `SAMPLE` of them at equal distances, so that it costs little in large models
    too. It leaves out the head, unless that is the embedding table, and the experts, which a process need not hold.

    Args:
        model: The model.
        experts: Module path of each MoE layer's experts.
    """
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    left_out = {id(each) for name in experts for each in model.get_submodule(name).parameters()}
    left_out |= {id(each) for each in head.parameters() if each is not table} if head is not None else set()
    return digest_of([_sample(each) for each in model.parameters() if id(each) not in left_out])


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if len(flat) <= SAMPLE or flat.is_meta:
        return flat
    return flat[torch.arange(SAMPLE, device=flat.device) * (len(flat) - 1) // (SAMPLE - 1)]


def digest_of(tensors: Iterable[Tensor]) -> str:
    """sha256 of tensors in bf16, one after the other; "" if they hold no values (on the meta device)."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor.is_meta:
            return ""
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
