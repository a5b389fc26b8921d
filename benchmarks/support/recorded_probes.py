"""Layer-ahead forecasts for recorded routing: probes read the recorded model's hidden states, not the running model's.

The running model has random weights, so that its own hidden states tell nothing of recorded routes. Recorded ones are
repeated to its width, so that a probe costs what it costs there.
Shape suffixes: B sequences, U positions, T tokens, D width of the running model, E logical experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from benchmarks.support.recorded import Mode, RecordedBatch, RecordedRouter
from data.arrays import IntArray
from data.models.layout import MoELayout
from runtime.engine.model import ReplicatedModel
from runtime.offload.layer_ahead import LayerProbes, ModelProbes


class RecordedProbes:
    """Gives a layer's probes the hidden states that the recorded router read."""

    def __init__(self, probes: LayerProbes, router: RecordedRouter) -> None:
        self._probes, self._router = probes, router
        self._batch: RecordedBatch | None = None
        self._hidden_BUD = torch.empty(0)  # of that batch

    def forecast(self, hidden_TD: Tensor, choice: Tensor, skipped_T: Tensor | None) -> Tensor:
        """See `runtime.experts.protocols.Probes`."""
        router = self._router
        if router.batch is not self._batch:  # once a batch, because a model has its hidden states at hand
            self._batch = router.batch
            self._hidden_BUD = repeated(router.batch.hidden[router.layer], hidden_TD.shape[1]).to(hidden_TD)
        return self._probes.forecast(self._hidden_BUD[:, router.columns].flatten(0, 1), choice, skipped_T)

    def use(self, forecast_E: IntArray) -> None:
        """See `runtime.experts.protocols.Probes`."""
        self._probes.use(forecast_E)


class RepeatedEmbedding(nn.Module):
    """The recorded model's embeddings, repeated to a width."""

    def __init__(self, embedding: Any, width: int) -> None:
        super().__init__()
        self._embedding, self._width = embedding, width

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids."""
        return repeated(self._embedding(ids.cpu()), self._width).to(ids.device)


def repeated(hidden: Tensor, width: int) -> Tensor:
    """Hidden states `[..., D]`, repeated to a width."""
    return torch.tile(hidden, (width // hidden.shape[-1],))


def foresee(
    replicated: ReplicatedModel, routers: Sequence[RecordedRouter], embedding: nn.Module, width: int, mode: Mode
) -> Any:
    """Has a model's probes read recorded hidden states and tokens.

    Returns:
        The handle of a hook that begins the steps of generation; None in other modes, which have no steps.
    """
    probes = replicated.probes
    assert probes is not None
    probes.embedding = RepeatedEmbedding(embedding, width)
    for layer, router, own in zip(replicated.layers, routers, probes.layers, strict=True):
        layer.probes = RecordedProbes(own, router)

    if mode != "generate":
        return None

    def begin_step(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        last, layout = routers[-1], replicated.loaded.layout
        columns = last.following(inputs["input_ids"].shape[1])
        probes.begin_step(written(last.batch, layout, columns).to(replicated.adapter.like.device))

    return replicated.adapter.stepper.register_forward_pre_hook(begin_step, with_kwargs=True)


def written(batch: RecordedBatch, layout: MoELayout, columns: slice) -> Tensor:
    """Tokens that the layers of a step of generation are given, `[B, U]`."""
    both = [batch.tokens.input_ids, batch.decoder.input_ids]
    return (torch.cat(both, 1) if layout.causal else both[1])[:, columns]


@torch.inference_mode()
def learn(probes: ModelProbes, batches: Sequence[RecordedBatch], layout: MoELayout, width: int) -> None:
    """Has probes learn from recorded generation, without a model that runs."""
    for batch in batches:
        probes.begin()
        for step in range(batch.steps(layout)):
            last = batch.columns(layout.num_layers - 1, layout, "generate", step)
            probes.begin_step(written(batch, layout, last))
            for number, layer in enumerate(probes.layers):
                columns = batch.columns(number, layout, "generate", step)
                experts = batch.experts[number][:, columns].flatten(0, 1).long()
                if len(experts):
                    hidden_TD = repeated(batch.hidden[number][:, columns].flatten(0, 1), width)
                    layer.forecast(hidden_TD, _choice(batch, number, columns, layout, experts), None)


def _choice(batch: RecordedBatch, layer: int, columns: slice, layout: MoELayout, experts_NK: Tensor) -> Tensor:
    """A router's choice as the layer's probes are given it: of a Switch model one-hot `[N, 1, E]`, else `[N, K]`."""
    if layout.causal:
        return experts_NK
    kept = batch.kept[layer][:, columns].flatten() if layer < layout.num_input_layers else torch.ones(len(experts_NK))
    return one_hot(experts_NK[:, 0], layout.num_experts)[:, None] * kept[:, None, None]
