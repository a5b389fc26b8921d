"""TokenTable: counts of which expert each token id went to in training, context ignored; the strongest baseline.

Shape suffixes: V vocabulary, B sequences, T positions, L MoE layers, E logical experts.
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
    """P(expert | token id, layer) for encoder layers; `Ema` for decoder layers, whose tokens are not known ahead.

    Args:
        layout: The host model.
        traces: Training batches.
        ema: Forecaster of the decoder layers.
    """

    name = "token_table"

    def __init__(self, layout: MoELayout, traces: Iterable[RouterTrace], ema: Ema) -> None:
        self.layout, self.ema = layout, ema
        counts_LVE = torch.zeros(layout.num_input_layers, layout.vocab_size, layout.num_experts)
        for trace in traces:
            mask = trace.tokens.mask
            for table, experts in zip(counts_LVE, trace.experts, strict=True):
                where = (trace.tokens.input_ids[mask], experts[mask].long())
                table.index_put_(where, torch.ones(len(where[0])), accumulate=True)
        seen_L1E = counts_LVE.sum(1, keepdim=True) + 1e-3
        counts_LVE += BACK_OFF * seen_L1E / seen_L1E.sum(-1, keepdim=True)
        self.table_LVE = counts_LVE / counts_LVE.sum(-1, keepdim=True)

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        load = self.ema.forecast(upcoming, history).load
        if upcoming is not None:
            for layer, table_VE in enumerate(self.table_LVE):
                share_BTE = table_VE[upcoming.input_ids] * upcoming.mask[..., None]
                variance_BE = (share_BTE * (1 - share_BTE)).sum(1)
                expected = capped(share_BTE.sum(1), variance_BE, self.layout.expert_capacity)
                load[layer] = expected.sum(0).numpy().astype(np.float64)
        return forecast_from_load(load, made_at=len(history), source=self.name)

    def route(self, upcoming: TokenBatch) -> Tensor:
        """The most likely expert of each token in each encoder layer, `[L_enc, B, T]`."""
        return self.table_LVE.argmax(-1)[:, upcoming.input_ids]
