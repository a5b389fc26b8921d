"""SRULayer: a Simple Recurrent Unit, one matrix product for all positions and an elementwise recurrence.

With c' the state at the position before:

    f = sigmoid(W_f x + v_f * c' + b_f)        c = f * c' + (1 - f) * (W x + b)
    r = sigmoid(W_r x + v_r * c' + b_r)        h = r * c + (1 - r) * a * x

Source: Lei, Zhang, Wang, Dai and Artzi, "Simple Recurrent Units for Highly Parallelizable Recurrence" (EMNLP 2018),
equations 3 to 7. On a CPU in float32 the recurrence is one compiled call each way that leaves the interpreter to other
threads; elsewhere, and where the layer is exported, it is torch operations, position after position.

Shape suffixes: T positions, B sequences, D directions (1, or 2 if half of the channels reads backwards), W channels of
a direction, H = D W width; 3 stands for candidate, forget gate and reset gate, 2 for the gates alone.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor, nn

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]

_1 = np.float32(1)
_LOG2_E, _LN_2_HIGH, _LN_2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_LIMIT = np.float32(80)
"""Sigmoids of larger numbers are 0 or 1 in float32."""
_FACTORIALS = tuple(np.float32(1 / math.factorial(power)) for power in range(7, -1, -1))


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})
def _sigmoid(values: Floats, exponents: Integers, powers: Floats) -> None:
    """Replaces values by their sigmoids, to 1.3e-7 of each; loops over floats that a compiler can vectorise.

    exp(-v) is 2^n exp(r) with |r| < .35, and exp(r) a polynomial. `powers` is `exponents` read as float32.
    """
    for i in range(len(values)):
        v = min(max(-values[i], -_LIMIT), _LIMIT)
        n = np.floor(v * _LOG2_E + np.float32(0.5))
        r = v - n * _LN_2_HIGH - n * _LN_2_LOW
        e = _FACTORIALS[0]
        for factor in _FACTORIALS[1:]:
            e = e * r + factor
        values[i], exponents[i] = e, (np.int32(n) + np.int32(127)) << np.int32(23)
    for i in range(len(values)):
        values[i] = _1 / (_1 + values[i] * powers[i])


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})
def _run(
    projected_TB3DW: Floats, x_TBDW: Floats, mask_TB: Floats, peephole_2DW: Floats, scale: np.float32,
    out_TBDW: Floats, state_TBDW: Floats, gates_TB2DW: Floats,
) -> None:  # fmt: skip
    """Fills output, states and gates of all positions; the second direction starts at the last position."""
    length, size, _, directions, width = projected_TB3DW.shape
    gates, exponents = np.empty(2 * width, np.float32), np.empty(2 * width, np.int32)
    powers, state_BDW = exponents.view(np.float32), np.zeros((size, directions, width), np.float32)
    for step in range(length):
        for b in range(size):
            for d in range(directions):
                t = step if d == 0 else length - 1 - step
                for w in range(width):
                    gates[w] = projected_TB3DW[t, b, 1, d, w] + peephole_2DW[0, d, w] * state_BDW[b, d, w]
                for w in range(width):
                    gates[width + w] = projected_TB3DW[t, b, 2, d, w] + peephole_2DW[1, d, w] * state_BDW[b, d, w]
                _sigmoid(gates, exponents, powers)
                for w in range(width):
                    candidate = projected_TB3DW[t, b, 0, d, w] * mask_TB[t, b]
                    state = candidate + gates[w] * (state_BDW[b, d, w] - candidate)
                    highway = scale * x_TBDW[t, b, d, w]
                    out_TBDW[t, b, d, w] = highway + gates[width + w] * (state - highway)
                    state_BDW[b, d, w] = state_TBDW[t, b, d, w] = state
                for w in range(width):
                    gates_TB2DW[t, b, 0, d, w] = gates[w]
                for w in range(width):
                    gates_TB2DW[t, b, 1, d, w] = gates[width + w]


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})
def _run_back(
    gradient_TBDW: Floats, projected_TB3DW: Floats, x_TBDW: Floats, mask_TB: Floats, peephole_2DW: Floats,
    scale: np.float32, state_TBDW: Floats, gates_TB2DW: Floats,
    to_projected_TB3DW: Floats, to_x_TBDW: Floats, to_peephole_2DW: Floats,
) -> None:  # fmt: skip
    """Fills the gradients of W x + b, of x, and of the peepholes (zeros before), from the last step to the first."""
    length, size, _, directions, width = projected_TB3DW.shape
    carry_BDW = np.zeros((size, directions, width), np.float32)  # the gradient of the state from the steps after
    zero = np.zeros((size, directions, width), np.float32)
    for step in range(length - 1, -1, -1):
        for b in range(size):
            for d in range(directions):
                t = step if d == 0 else length - 1 - step
                before_BDW = zero if step == 0 else state_TBDW[t - 1 if d == 0 else t + 1]
                for w in range(width):
                    forget, reset = gates_TB2DW[t, b, 0, d, w], gates_TB2DW[t, b, 1, d, w]
                    state, before = state_TBDW[t, b, d, w], before_BDW[b, d, w]
                    gradient, highway = gradient_TBDW[t, b, d, w], scale * x_TBDW[t, b, d, w]
                    candidate = projected_TB3DW[t, b, 0, d, w] * mask_TB[t, b]
                    to_reset = gradient * (state - highway) * reset * (_1 - reset)
                    to_state = gradient * reset + carry_BDW[b, d, w]
                    to_forget = to_state * (before - candidate) * forget * (_1 - forget)
                    to_x_TBDW[t, b, d, w] = scale * gradient * (_1 - reset)
                    to_projected_TB3DW[t, b, 0, d, w] = to_state * (_1 - forget) * mask_TB[t, b]
                    to_projected_TB3DW[t, b, 1, d, w] = to_forget
                    to_projected_TB3DW[t, b, 2, d, w] = to_reset
                    to_peephole_2DW[0, d, w] += to_forget * before
                    to_peephole_2DW[1, d, w] += to_reset * before
                    through_gates = to_forget * peephole_2DW[0, d, w] + to_reset * peephole_2DW[1, d, w]
                    carry_BDW[b, d, w] = to_state * forget + through_gates


class Recurrence(torch.autograd.Function):
    """The compiled recurrence and its gradient; float32 on the CPU."""

    @staticmethod
    def forward(
        ctx: Any, projected_TB3DW: Tensor, x_TBDW: Tensor, mask_TB: Tensor, peephole_2DW: Tensor, scale: float
    ) -> Tensor:
        """Returns the output h, `[T, B, D, W]`; the state before the first position is zero."""
        out_TBDW, state_TBDW = torch.empty_like(x_TBDW), torch.empty_like(x_TBDW)
        gates_TB2DW = torch.empty_like(projected_TB3DW[:, :, 1:])
        inputs = projected_TB3DW, x_TBDW, mask_TB, peephole_2DW
        projected, x, mask, peephole = _arrays(*inputs)
        _run(projected, x, mask, peephole, np.float32(scale), *_arrays(out_TBDW, state_TBDW, gates_TB2DW))
        ctx.save_for_backward(*inputs, state_TBDW, gates_TB2DW)
        ctx.scale = scale
        return out_TBDW

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of W x + b, of x, and of the peepholes."""
        projected, x, mask, peephole, *made = ctx.saved_tensors
        to_inputs = torch.empty_like(projected), torch.empty_like(x), torch.zeros_like(peephole)
        inputs = *_arrays(gradients[0].contiguous(), projected, x, mask, peephole), np.float32(ctx.scale)
        _run_back(*inputs, *_arrays(*made, *to_inputs))
        return to_inputs[0], to_inputs[1], None, to_inputs[2], None


def _arrays(*tensors: Tensor) -> Any:
    return [tensor.detach().numpy() for tensor in tensors]


def compile_kernels() -> None:
    """Compiles the recurrence and its gradient and caches them on disk: some seconds once, none afterwards."""
    layer = SRULayer(2, bidirectional=True)
    layer(torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool)).sum().backward()


def unrolled(projected_TB3DW: Tensor, x_TBDW: Tensor, mask_TB: Tensor, peephole_2DW: Tensor, scale: float) -> Tensor:
    """The output of `Recurrence`, `[T, B, D, W]`, in torch operations: any device and dtype, and `torch.export`."""
    candidate = projected_TB3DW[:, :, 0] * mask_TB[..., None, None]
    turned = [_turned(part) for part in (candidate, projected_TB3DW[:, :, 1], projected_TB3DW[:, :, 2])]
    state, states, resets = torch.zeros_like(x_TBDW[0]), [], []
    for candidate, forget, reset in zip(*(part.unbind() for part in turned), strict=True):
        resets.append(torch.addcmul(reset, peephole_2DW[1], state).sigmoid())
        state = torch.lerp(candidate, state, torch.addcmul(forget, peephole_2DW[0], state).sigmoid())
        states.append(state)
    return torch.lerp(scale * x_TBDW, _turned(torch.stack(states)), _turned(torch.stack(resets)))


def _turned(value_TBDW: Tensor) -> Tensor:
    """The value with its second direction, if there is one, reversed in time."""
    if value_TBDW.shape[2] == 1:
        return value_TBDW
    return torch.stack([value_TBDW[:, :, 0], value_TBDW[:, :, 1].flip(0)], 2)


class SRULayer(nn.Module):
    """One SRU layer; input and output have the same width, so the highway connection needs no projection.

    Args:
        width: H, input and output width.
        bidirectional: Whether half of the channels reads from right to left.
    """

    def __init__(self, width: int, bidirectional: bool) -> None:
        super().__init__()
        if bidirectional and width % 2:
            raise ValueError(f"a bidirectional SRU needs an even width, got {width}")
        self.directions = 2 if bidirectional else 1
        self.project = nn.Linear(width, 3 * width)
        self.peephole = nn.Parameter(torch.zeros(2, width))
        self.scale = math.sqrt(3.0)  # keeps the variance of the highway at initialisation (their section 3.2)
        nn.init.uniform_(self.project.weight, -math.sqrt(3 / width), math.sqrt(3 / width))
        nn.init.zeros_(self.project.bias)

    def forward(self, x_TBH: Tensor, mask_TB: Tensor) -> Tensor:
        """Maps `[T, B, H]` to the same shape; padding must come last and does not affect the other positions."""
        exact = self.peephole.dtype  # mixed precision rounds the matrix product only, never the state
        length, size, width = x_TBH.shape
        halves = self.directions, width // self.directions
        compiled = exact == torch.float32 and x_TBH.device.type == "cpu" and not torch.compiler.is_exporting()
        recurrence: Any = Recurrence.apply if compiled else unrolled
        h_TBDW: Tensor = recurrence(
            self.project(x_TBH).to(exact).view(length, size, 3, *halves),
            x_TBH.to(exact).reshape(length, size, *halves).contiguous(),
            mask_TB.to(exact).contiguous(),  # right to left, the state stays zero until the first real token
            self.peephole.view(2, *halves),
            self.scale,
        )
        return h_TBDW.flatten(2)
