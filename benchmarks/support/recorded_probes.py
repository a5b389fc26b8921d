"""Layer-ahead forecasts for recorded routing: probes read the recorded model's hidden states, not the running model's.

The running model has random weights, so that its own hidden states tell nothing of recorded routes. Recorded ones are
repeated to its width, so that a probe costs what it costs there.
Shape suffixes: T tokens, D width of the running model, E logical experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from benchmarks.support.recorded import RecordedBatch, RecordedRouter
from data.arrays import IntArray
from runtime.engine.model import ReplicatedModel
from runtime.offload.layer_ahead import LayerProbes, ModelProbes


class RecordedProbes:
    """Gives a layer's probes the hidden states that the recorded router read."""

    def __init__(self, probes: LayerProbes, router: RecordedRouter) -> None:
        self._probes, self._router = probes, router

    def forecast(self, hidden_TD: Tensor, choice: Tensor, skipped_T: Tensor | None) -> Tensor:
        """See `runtime.experts.protocols.Probes`."""
        router = self._router
        assert router.batch is not None, "no batch was set"
        step = None if router.step is None else router.step - 1  # the router has run and counted it
        recorded_TD = hidden_states(router.batch, router.layer, step, hidden_TD.shape[1]).to(hidden_TD)
        return self._probes.forecast(recorded_TD, choice, skipped_T)

    def use(self, forecast_E: IntArray) -> None:
        """See `runtime.experts.protocols.Probes`."""
        self._probes.use(forecast_E)


class RepeatedEmbedding(nn.Module):
    """The recorded model's embeddings, repeated to a width."""

    def __init__(self, embedding: nn.Embedding, width: int) -> None:
        super().__init__()
        self._embedding, self._times = embedding, width // embedding.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids."""
        return torch.tile(self._embedding(ids.cpu()), (self._times,)).to(ids.device)


def hidden_states(batch: RecordedBatch, layer: int, step: int | None, width: int) -> Tensor:
    """What the recorded router of a layer read, `[T, D]`; `step` picks one decoder position of each sequence."""
    recorded = batch.hidden[layer] if step is None else batch.hidden[layer][:, step]
    return torch.tile(recorded.flatten(0, -2), (width // recorded.shape[-1],))


def foresee(replicated: ReplicatedModel, routers: Sequence[RecordedRouter], embedding: nn.Embedding, width: int) -> Any:
    """Has a model's probes read recorded hidden states and tokens; returns the handle of a hook."""
    probes = replicated.probes
    assert probes is not None
    probes.embedding = RepeatedEmbedding(embedding, width)
    for layer, router, own in zip(replicated.layers, routers, probes.layers, strict=True):
        layer.probes = RecordedProbes(own, router)

    def begin_step(module: nn.Module, args: tuple[Any, ...]) -> None:
        batch, step = routers[-1].batch, routers[-1].step
        if batch is not None and step is not None:
            probes.begin_step(batch.decoder.input_ids[:, step : step + 1].to(replicated.adapter.like.device))

    return replicated.adapter.stepper.register_forward_pre_hook(begin_step)


@torch.inference_mode()
def learn(probes: ModelProbes, batches: Sequence[RecordedBatch], inputs: int, width: int) -> None:
    """Has probes learn from recorded generation, without a model that runs; `inputs` encoder layers come first."""
    for batch in batches:
        probes.begin()
        for step in range(batch.decoder.input_ids.shape[1]):
            probes.begin_step(batch.decoder.input_ids[:, step : step + 1])
            for layer in probes.layers[inputs if step else 0 :]:
                number = layer.slots.layer
                at = None if number < inputs else step
                experts = batch.experts[number] if at is None else batch.experts[number][:, step]
                kept = batch.kept[number].flatten() if at is None else torch.ones_like(experts)
                choice = one_hot(experts.flatten().long(), layer.probe.num_experts) * kept[:, None]
                layer.forecast(hidden_states(batch, number, at, width), choice[:, None], None)
