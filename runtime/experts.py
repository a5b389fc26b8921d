"""SlotExperts: the drop-in for a Switch model's experts module. Same answers, work spread over slots and devices.

With one process for each device, tokens travel to their slots and back. In one process, devices are emulated: each
one's share of the work runs and is timed in turn.

Shape suffixes: T tokens of this rank, M rows, S ranks, E logical experts, P slots, N places, G devices, D model width.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from runtime.flight import Flight, upload
from runtime.peers import Peers
from runtime.plan import IntArray
from runtime.route import route, starts
from runtime.slots import SlotWeights
from runtime.split import device_load, split_by_quota
from runtime.stopwatch import Stopwatch

PIPELINED = 1024
"""Tokens of all ranks from which on a layer runs in two halves, so that one half travels while the other computes."""


class SlotExperts(nn.Module):
    """Computes `experts(hidden, one_hot, weights)` over the slots of a plan.

    Set `phy2log` (`[P]`, the layer's row of the plan in force) and `needed` (which rows of `hidden` must be computed;
    None means all) before a forward. Afterwards `load`, `device_load`, `sent` and the stopwatches tell what it did.

    Args:
        weights: The slots of this process.
        activation: Between the two products of an expert.
        phy2log: The layer's row of the plan in force, `[P]`.
        peers: The ranks; each has as many devices as `weights` has.
        num_devices: G, over all ranks.
        wake_tokens: Tokens a device computes in the time it takes to read one more expert's weights.

    Attributes:
        load: Tokens of each expert that were computed on any rank, `[E]`, summed over the calls since `reset`.
        device_load: Tokens each device computed, `[G]`, likewise.
        sent: Tokens that left their rank, likewise.
        busy: A stopwatch for each device of this process.
        waited: How long this process waited for other ranks.
    """

    def __init__(
        self,
        weights: SlotWeights,
        activation: nn.Module,
        phy2log: IntArray,
        peers: Peers,
        num_devices: int,
        wake_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.weights, self.activation, self.phy2log, self.peers = weights, activation, phy2log, peers
        self.num_devices, self.wake_tokens = num_devices, wake_tokens
        self.busy = [Stopwatch(weights.wi_NFD.device) for _ in weights.devices]
        self.waited = Stopwatch(torch.device("cpu"))
        self.needed: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Starts counting anew."""
        self.load = np.zeros(int(self.phy2log.max()) + 1, dtype=np.int64)
        self.device_load = np.zeros(self.num_devices, dtype=np.int64)
        self.sent = 0

    def forward(self, hidden_TD: Tensor, one_hot_T1E: Tensor, weight_T1: Tensor) -> Tensor:
        """Same contract as `SwitchTransformersExperts`: dropped tokens (all-zero rows), and rows not needed, get 0."""
        routed_TE = one_hot_T1E[:, 0]
        one_hot_TE = routed_TE if self.needed is None else routed_TE * self.needed[:, None]
        expert_T = torch.where(one_hot_TE.any(-1), one_hot_TE.argmax(-1), one_hot_TE.shape[-1])
        token_T = expert_T.argsort(stable=True)  # those left out come last
        with self.waited.running():  # the one wait for the device: sizes must be known here
            counts_S2E = self.peers.gather(torch.stack([one_hot_TE.sum(0), routed_TE.sum(0)])).cpu().numpy()
        quota_SP = self.split(counts_S2E[:, 0])
        self.load += counts_S2E[:, 0].sum(0)
        self.device_load += device_load(quota_SP, self.num_devices)
        return self.spread(hidden_TD, token_T, weight_T1, quota_SP, counts_S2E[:, 1].sum(0))

    def split(self, counts_SE: IntArray) -> IntArray:
        """Tokens from each rank to each slot, `[S, P]`."""
        return split_by_quota(counts_SE, self.phy2log, self.num_devices, wake_tokens=self.wake_tokens)

    def spread(
        self, hidden_TD: Tensor, token_T: Tensor, weight_T1: Tensor, quota_SP: IntArray, routed_E: IntArray
    ) -> Tensor:
        """Sends tokens, sorted by expert, where the quotas say; computes what arrives here; collects the results.

        `routed_E` are the rows the plain model would multiply with each expert, as far as known, padding counted.
        """
        flights = []
        start_P = starts(quota_SP[self.peers.rank], self.phy2log)
        routed_P = routed_E[self.phy2log]  # of no meaning in empty slots, which get no tokens
        for slots in self._halves(int(quota_SP.sum())):
            part_SP = np.where(slots, quota_SP, 0)
            away = part_SP.reshape(len(part_SP), self.peers.world, -1).sum(-1) * ~np.eye(self.peers.world, dtype=bool)
            self.sent += int(away.sum())
            way = route(
                part_SP, start_P, routed_P, self.peers.rank, self.weights.slots, self.weights.places,
                len(self.weights.wi_NFD),
            )  # fmt: skip
            flights.append(Flight(hidden_TD, token_T, way, self.peers, bool(away.any())))
        for flight in flights:
            with self.waited.running():
                rows_MD = flight.rows()
            flight.land(self._compute(rows_MD, flight.route.rows))
        output_TD = torch.zeros_like(hidden_TD)
        for flight in flights:
            with self.waited.running():
                flight.deliver(output_TD, weight_T1)
        return output_TD

    def _halves(self, tokens: int) -> list[npt.NDArray[np.bool_]]:
        """Slots that run together, `[P]` each: all of them, or the first and the second half of each rank's."""
        slots = np.arange(len(self.phy2log))
        if self.peers.world == 1 or tokens < PIPELINED:
            return [slots >= 0]
        per_rank = len(slots) // self.peers.world
        first = slots % per_rank < per_rank // 2
        return [first, ~first]

    def _compute(self, rows_MD: Tensor, rows_N: IntArray) -> Tensor:
        """Runs each device's rows, which lie next to each other, through its slots."""
        rows_GN, parts = rows_N.reshape(len(self.weights.devices), -1), []
        for device, part_MD in enumerate(rows_MD.split_with_sizes(rows_GN.sum(-1).tolist())):
            if len(part_MD):
                with self.busy[device].running():
                    parts.append(self._products(part_MD, device, rows_GN[device]))
        return parts[0] if len(parts) == 1 else torch.cat([rows_MD.narrow(0, 0, 0), *parts])

    def _products(self, rows_MD: Tensor, device: int, rows_N: IntArray) -> Tensor:
        """The experts of one device over its rows."""
        wi_NDF, wo_NFD = self.weights.block(device)
        offsets = upload(rows_N.cumsum().astype(np.int32), rows_MD.device)
        return grouped_mm(self.activation(grouped_mm(rows_MD, wi_NDF, offs=offsets)), wo_NFD, offs=offsets)
