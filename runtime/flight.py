"""Flight: some of a layer's tokens on their way to their slots and back.

Shape suffixes: T tokens of this rank, A rows that arrive, M rows computed, D model width.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.peers import Peers
from runtime.plan import IntArray
from runtime.route import Route


class Flight:
    """Takes off when made; `rows` are to be computed, `land` sends the results back, `deliver` writes them out.

    Between these steps other work may be done: rows travel meanwhile.

    Args:
        hidden_TD: This rank's hidden states.
        token_T: Its tokens sorted by expert.
        route: Which of them go where.
        peers: The ranks.
        crowded: Whether any rank sends another one anything on this route; all ranks must say the same.
    """

    def __init__(self, hidden_TD: Tensor, token_T: Tensor, route: Route, peers: Peers, crowded: bool) -> None:
        self.route, self._peers, self._crowded = route, peers, crowded
        token = token_T.index_select(0, upload(route.pick, token_T.device))
        self._staying = token.narrow(0, 0, route.kept)
        self._leaving = token.narrow(0, route.kept, len(route.pick) - route.kept)
        self._arrived_AD = hidden_TD.new_empty((len(route.row), hidden_TD.shape[-1]))
        if crowded:
            self._sent = hidden_TD.index_select(0, self._leaving)
            from_others = self._arrived_AD.narrow(0, route.kept, len(route.row) - route.kept)
            self._work = peers.exchange(self._sent, route.to, from_others, route.arriving)
        torch.index_select(hidden_TD, 0, self._staying, out=self._arrived_AD.narrow(0, 0, route.kept))

    def rows(self) -> Tensor:
        """The rows to compute, place by place, `[M, D]`; waits for those that come from other ranks."""
        if self._crowded:
            self._work.wait()
        if self.route.straight:
            return self._arrived_AD
        order = np.empty_like(self.route.row)
        order[self.route.row] = np.arange(len(order))
        return self._arrived_AD.index_select(0, upload(order, self._arrived_AD.device))

    def land(self, result_MD: Tensor) -> None:
        """Sends results back to where their tokens came from."""
        route = self.route
        if not route.straight:
            result_MD = result_MD.index_select(0, upload(route.row, result_MD.device))
        self._done = result_MD.narrow(0, 0, route.kept)
        if self._crowded:
            self._returning = result_MD.narrow(0, route.kept, len(route.row) - route.kept)
            self._returned = torch.empty_like(self._sent)
            self._work = self._peers.exchange(self._returning, route.arriving, self._returned, route.to)

    def deliver(self, output_TD: Tensor, weight_T1: Tensor) -> None:
        """Writes results times their router weights to where the tokens are; waits for those from other ranks."""
        output_TD.index_copy_(0, self._staying, self._done * weight_T1.index_select(0, self._staying))
        if self._crowded:
            self._work.wait()
            output_TD.index_copy_(0, self._leaving, self._returned * weight_T1.index_select(0, self._leaving))


def upload(index: IntArray, device: torch.device) -> Tensor:
    """Positions on a device; from pinned memory where that lets the host go on."""
    tensor: Any = torch.from_numpy(index)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)  # type: ignore[no-any-return]
    return tensor  # type: ignore[no-any-return]
