"""Slots and Probes: what a MoE layer computes with, and what forecasts the layer after it, as protocols.

Shape suffixes: T tokens of this rank, K experts of a token, E logical experts, Q slots of this rank, M rows this rank
computes, D model width.
"""

from typing import Protocol

from torch import Tensor

from data.arrays import IntArray


class Slots(Protocol):
    """This process' slots of one layer: what `ReplicatedExperts` computes with."""

    @property
    def span(self) -> slice:
        """These slots among all slots of the plan."""
        ...

    @property
    def can_overlap(self) -> bool:
        """Whether a layer may be computed in two calls."""
        ...

    @property
    def needs_no_sizes(self) -> bool:
        """Whether `compute_groups` may be called, so that the host need not know the rows of each slot."""
        ...

    @property
    def buffers(self) -> tuple[int, int]:
        """Devices here whose rows are computed in one call for many buffers, and buffers of each; zeros if none."""
        ...

    @property
    def active_buffers(self) -> IntArray:
        """Buffer of each slot, counted over all devices here."""
        ...

    def compute(self, rows_MD: Tensor, size_Q: IntArray, reference_Q: IntArray, ends: Tensor | None) -> Tensor:
        """Outputs for rows sorted by slot, `[M, D]`.

        Args:
            rows_MD: Rows.
            size_Q: Rows of each slot; they sum to M.
            reference_Q: Rows that the unmodified model would multiply with the slot's expert.
            ends: Row at which the rows of each buffer end, counted on each device here from 0: int32, on the device.
                None if they are not there yet.
        """
        ...

    def compute_groups(self, rows_MD: Tensor, ends_Q: Tensor) -> Tensor:
        """Outputs for rows sorted by slot that end at the given rows; rows beyond them get no particular value."""
        ...

    def measure(self, on: bool) -> None:
        """Begins to measure times anew, or ends it."""
        ...

    def take_busy_ms(self) -> list[float]:
        """Milliseconds each device here computed since the last call of this method."""
        ...


class Probes(Protocol):
    """Forecasts the load of the MoE layer that runs next from what one layer is given."""

    def forecast(self, hidden_TD: Tensor, choice: Tensor, skipped_T: Tensor | None) -> Tensor:
        """This rank's part of the forecast, int32 `[E]`, the same on all ranks only in its shape.

        Args:
            hidden_TD: Hidden states.
            choice: What the router returned.
            skipped_T: Whether the token need not be computed; None means that all must.
        """
        ...

    def use(self, forecast_E: IntArray) -> None:
        """Takes the sum over all ranks."""
        ...
