"""Shapes of expert layers: what a table of kernel times is looked up by, and the models that are known by name."""

from dataclasses import dataclass

WEIGHT_BITS = {
    "bfloat16": 16.0, "fp8": 8.0, "fp8_block": 8.0, "nvfp4": 4.5, "w4a16_mxfp4": 4.25, "w4a8_mxfp4_mxfp8": 4.25,
    "int4_wo": 4.5,
}  # fmt: skip
"""Bits that a weight takes in each precision, scales included; the names are those of the tables."""
EIGHT_BIT = ("fp8", "fp8_block", "nvfp4", "w4a8_mxfp4_mxfp8")
"""Precisions whose products run on the 8-bit units, or on faster ones; the others run in bfloat16."""


@dataclass(frozen=True)
class ExpertShape:
    """Sizes of one expert layer.

    Attributes:
        name: The model, or "custom".
        hidden_size: Width of the hidden states.
        intermediate_size: Inner width of an expert.
        top_k: Experts of a token.
        num_experts: Experts of a layer, E.
        precision: A name in `WEIGHT_BITS`.
        layers: MoE layers of the model; None where that is unknown.
        matrices: Weight matrices of an expert: 3 where it is gated, else 2.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    top_k: int
    num_experts: int
    precision: str = "bfloat16"
    layers: int | None = None
    matrices: int = 3

    def __post_init__(self) -> None:
        for field in ("hidden_size", "intermediate_size", "top_k", "num_experts"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected 1 or more")
        if self.precision not in WEIGHT_BITS:
            raise ValueError(f"precision: unknown '{self.precision}'; choose from {', '.join(WEIGHT_BITS)}")

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert's weights."""
        return self.matrices * self.hidden_size * self.intermediate_size * WEIGHT_BITS[self.precision] / 8

    @property
    def operations(self) -> float:
        """Floating-point operations of one expert for one token."""
        return 2.0 * self.matrices * self.hidden_size * self.intermediate_size


MODELS = {
    shape.name: shape
    for shape in (
        ExpertShape("deepseek_v3", 7168, 2048, 8, 256, "fp8_block", 58),
        ExpertShape("kimi_k2", 7168, 2048, 8, 384, "fp8_block", 60),
        ExpertShape("glm_5", 6144, 2048, 8, 256, "bfloat16", 75),
        ExpertShape("minimax_m2", 3072, 1536, 8, 256, "fp8_block", 62),
        ExpertShape("qwen3_30b", 2048, 768, 8, 128, "bfloat16", 48),
        ExpertShape("qwen3_235b", 4096, 1536, 8, 128, "bfloat16", 94),
        ExpertShape("gpt_oss_20b", 2880, 2880, 4, 32, "w4a16_mxfp4", 24),
        ExpertShape("gpt_oss_120b", 2880, 2880, 4, 128, "w4a16_mxfp4", 36),
        ExpertShape("mixtral_8x7b", 4096, 14336, 2, 8, "bfloat16", 32),
        ExpertShape("llama4_maverick", 5120, 8192, 1, 128, "bfloat16", 24),
        ExpertShape("deepseek_v2_lite", 2048, 1408, 6, 64, "bfloat16", 26),
        ExpertShape("switch_base_128", 768, 3072, 1, 128, "bfloat16", 12, matrices=2),
    )
}  # fmt: skip
"""Models by the names that `--like` takes."""


def known_shape(name: str) -> ExpertShape:
    """The shape of a known model.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in MODELS:
        raise ValueError(f"like: unknown '{name}'; choose from {', '.join(MODELS)}, or give the sizes of your layer")
    return MODELS[name]
