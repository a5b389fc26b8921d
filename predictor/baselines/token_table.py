"""TokenTable: counts of which experts each token id went to in training, context ignored; the strongest baseline.

Shape suffixes: V token ids seen in training, B sequences, T positions, K experts of a token, L MoE layers, E logical
experts.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from data.models.layout import MoELayout
from data.traces.trace import RouterTrace, TokenBatch
from predictor.baselines.history import Ema
from predictor.forecast import LoadForecast, LoadHistory, forecast_from_load
from predictor.network import capped

BACK_OFF = 1.0
"""Pseudo-counts per token id, distributed as the layer's mean share; tokens not seen in training get that share."""


class TokenTable:
    """P(expert | token id, layer) for input layers; `Ema` for decoder layers, whose tokens are not known ahead.

    Args:
        layout: The host model.
        traces: Training batches.
        ema: Forecaster of the decoder layers.
    """

    name = "token_table"

    def __init__(self, layout: MoELayout, traces: Iterable[RouterTrace], ema: Ema) -> None:
        self.layout, self.ema = layout, ema
        self.row_of = torch.zeros(layout.vocab_size + 1, dtype=torch.int64)
        """Row of each token id in the table; row 0 is for ids not seen in training, and for unwritten tokens."""
        counts_VLE = torch.zeros(1, layout.num_input_layers, layout.num_experts)
        for trace in traces:
            computed, rows = trace.tokens.computed, self._rows_of(trace.tokens.input_ids[trace.tokens.computed])
            if (size := int(self.row_of.max()) + 1) > len(counts_VLE):
                grown = counts_VLE.new_zeros(2 * size, *counts_VLE.shape[1:])
                grown[: len(counts_VLE)] = counts_VLE
                counts_VLE = grown
            for layer, experts in enumerate(trace.experts):
                chosen = experts[computed].long()  # [N, K]
                where = (rows[:, None].expand_as(chosen).flatten(), torch.tensor(layer), chosen.flatten())
                counts_VLE.index_put_(where, torch.ones(chosen.numel()), accumulate=True)
        counts_LVE = counts_VLE[: int(self.row_of.max()) + 1].transpose(0, 1)
        seen_L1E = counts_LVE.sum(1, keepdim=True) + 1e-3
        counts_LVE = counts_LVE + BACK_OFF * seen_L1E / seen_L1E.sum(-1, keepdim=True)
        self.table_LVE = counts_LVE / counts_LVE.sum(-1, keepdim=True)

    def _rows_of(self, ids: Tensor) -> Tensor:
        """Rows of token ids; an id that is new gets the next one."""
        new = torch.unique(ids[self.row_of[ids] == 0])
        self.row_of[new] = int(self.row_of.max()) + 1 + torch.arange(len(new))
        return self.row_of[ids]

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        load = self.ema.forecast(upcoming, history).load
        if upcoming is not None:
            rows, top_k = self.row_of[upcoming.input_ids], self.layout.experts_per_token
            for layer, table_VE in enumerate(self.table_LVE):
                share_BTE = top_k * table_VE[rows] * upcoming.computed[..., None]
                variance_BE = (share_BTE * (1 - share_BTE)).sum(1).clamp(min=0)
                expected = capped(share_BTE.sum(1), variance_BE, self.layout.expert_capacity)
                load[layer] = expected.sum(0).numpy().astype(np.float64)
        return forecast_from_load(load, made_at=len(history), source=self.name)

    def route(self, upcoming: TokenBatch) -> Tensor:
        """The K most likely experts of each token in each input layer, `[L_in, B, T, K]`."""
        best_LVK = self.table_LVE.topk(self.layout.experts_per_token, -1).indices
        return best_LVK[:, self.row_of[upcoming.input_ids]]
