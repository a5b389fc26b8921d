"""ExpertFormat: the tensors that one expert consists of, for every family.

An expert is two products with an activation or a gate between them. Its tensors stand in one order everywhere: the
matrix of the first product, that of the second, then the bias of the first and of the second, if it has any.

    family                  first matrix            second matrix         biases
    Switch                  wi [F, D]               wo [D, F]             none
    Mixtral, Qwen3-MoE ...  gate_up_proj [2F, D]    down_proj [D, F]      none
    Nemotron-H (no gate)    up_proj [F, D]          down_proj [D, F]      none
    gpt-oss (transposed)    gate_up_proj [D, 2F]    down_proj [F, D]      [2F] and [D]
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from data.models.layout import SWITCH, MoELayout


@dataclass(frozen=True)
class ExpertFormat:
    """What one expert's weights are.

    Attributes:
        names: Name of each tensor below its expert (Switch) or below its experts module, which stacks all experts.
        shapes: Shape of each tensor of one expert.
        transposed: Whether matrices are stored `[in, out]`, as they are multiplied with, and not `[out, in]`.
        gated: Whether the first product has twice the inner width: a gate, and what it lets through.
        interleaved: Whether these two alternate column by column; else the gate's columns come first.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transposed: bool = False
    gated: bool = False
    interleaved: bool = False

    @property
    def biased(self) -> bool:
        """Whether both products add a bias."""
        return len(self.names) == 4

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of one expert."""
        return sum(prod(shape) for shape in self.shapes) * dtype.itemsize

    @classmethod
    def plain(cls, d_ff: int, d_model: int) -> "ExpertFormat":
        """Switch's format: two matrices."""
        return cls(("wi.weight", "wo.weight"), ((d_ff, d_model), (d_model, d_ff)))

    @classmethod
    def of(cls, model: Any, layout: MoELayout) -> "ExpertFormat":
        """Reads the format off a live model; its experts may be on the meta device."""
        if layout.family == SWITCH:
            return cls.plain(layout.d_ff, layout.d_model)
        experts = model.get_submodule(layout.modules[0])
        matrices = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
        names = (*matrices, *(f"{name}_bias" for name in matrices)) if experts.has_bias else matrices
        shapes = tuple(tuple(experts.get_parameter(name).shape[1:]) for name in names)
        return cls(names, shapes, experts.is_transposed, experts.has_gate, not experts.is_concatenated)
