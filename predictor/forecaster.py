"""NeuralForecaster: a trained network that forecasts the load of the coming batch. Needs torch, numpy and numba only.

Shape suffixes: V vocabulary, D host width, K past batches, L MoE layers, E logical experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.arrays import IntArray
from data.models.layout import MoELayout
from data.traces.trace import UNKNOWN, TokenBatch
from predictor.forecast import LoadForecast, SequenceForecast, forecast_from_load
from predictor.layers import WINDOW
from predictor.network import LoadNetwork, Prediction


class Estimate(NamedTuple):
    """A predicted load and three terms of its squared error.

    Attributes:
        load: Expected dispatched assignments, `[L, E]`.
        terms: Each `[L, E]`, stacked to `[3, L, E]`: the variance of independent choices; the squared load, for a bias
            proportional to it; and the squared difference between this forecast and the history-based one (the last
            load, if there is only history): the more a forecast departs from history, the larger its error tends to be.
    """

    load: Tensor
    terms: Tensor


class NeuralForecaster:
    """Forecasts from the coming batch's tokens and past loads, or from past loads alone.

    Args:
        layout: Layout of the host model.
        network: The trained network.
        embedding: The host model's token embeddings, `[V, D]`; None for a network with its own.
        spread: Weights of the three terms of `Estimate` in the squared error of a load, for forecasts with tokens (0)
            and without (1), `[2, L, 3]`.
    """

    name = "learned"

    def __init__(self, layout: MoELayout, network: LoadNetwork, embedding: Tensor | None, spread: Tensor) -> None:
        self.layout, self.network, self.embedding, self.spread = layout, network.eval(), embedding, spread
        self.shape = layout.num_layers, layout.num_experts

    def forecast(
        self,
        upcoming: TokenBatch | Mapping[str, Any] | None,
        history: IntArray | Tensor | Sequence[Any] | None = None,
    ) -> LoadForecast:
        """Forecasts the load of the coming batch.

        Args:
            upcoming: The coming batch: a `TokenBatch` or the output of a Hugging Face tokenizer; None if it is not
                known.
            history: Loads of the batches that have run, oldest first: an array or tensor `[K, L, E]` or a list of
                `[L, E]`; None if no batch has run.

        Raises:
            TypeError: If `upcoming` is neither a `TokenBatch` nor the output of a tokenizer.
            ValueError: If sequences are not padded, a token id has no embedding, or the history is of another model.
        """
        return self._forecast(upcoming, history)[0]

    def forecast_and_logits(
        self,
        upcoming: TokenBatch | Mapping[str, Any] | None,
        history: IntArray | Tensor | Sequence[Any] | None = None,
    ) -> tuple[LoadForecast, Tensor | None]:
        """The forecast, and the logits behind it over the experts of each token, `[B, T, L_in, E]`.

        Arguments and errors are those of `forecast`. The logits are None if no tokens are known.
        """
        forecast, prediction = self._forecast(upcoming, history)
        return forecast, None if prediction is None else prediction.token_logits

    def forecast_by_sequence(
        self,
        upcoming: TokenBatch | Mapping[str, Any] | None,
        history: IntArray | Tensor | Sequence[Any] | None = None,
    ) -> tuple[LoadForecast, SequenceForecast | None]:
        """The forecast, and each sequence's part of it, into which no past loads are blended.

        Arguments and errors are those of `forecast`. The parts are None if no tokens are known.
        """
        forecast, prediction = self._forecast(upcoming, history)
        if prediction is None:
            return forecast, None
        return forecast, SequenceForecast(prediction.sequence_load.numpy(), prediction.features.numpy())

    def _forecast(
        self,
        upcoming: TokenBatch | Mapping[str, Any] | None,
        history: IntArray | Tensor | Sequence[Any] | None,
    ) -> tuple[LoadForecast, Prediction | None]:
        """The forecast, and the network's output; None if no tokens are known."""
        past_KLE = self._past(history)
        tokens = None if upcoming is None else TokenBatch.of(upcoming)
        prediction = self.predict(tokens, past_KLE) if tokens is not None and tokens.num_tokens else None
        load, terms = self._estimate(prediction, past_KLE)
        square = torch.einsum("ls,sle->le", self.spread[1 if prediction is None else 0], terms)
        total = load.sum(-1, keepdim=True).clamp(min=1e-9)
        spread = (square.sqrt() / total).double().numpy()
        made_at = 0 if history is None else len(history)
        return forecast_from_load(load.double().numpy(), made_at=made_at, source=self.name, spread=spread), prediction

    def _past(self, history: IntArray | Tensor | Sequence[Any] | None) -> Tensor:
        """The last `WINDOW` past loads, float32 `[K, L, E]`."""
        shape = self.shape
        if history is None or not len(history):
            return torch.zeros(0, *shape)
        expected = f"history: expected [K, L, E] = [K, {shape[0]}, {shape[1]}], past loads of {self.layout.model_id}"
        try:
            if isinstance(history, Sequence):
                past = torch.stack([torch.as_tensor(load) for load in history[-WINDOW:]])
            else:
                past = torch.as_tensor(history[-WINDOW:])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{expected}, got no array of loads ({error})") from None
        if past.dim() != 3 or past.shape[1:] != shape:
            raise ValueError(f"{expected}, got shape {[len(history), *past.shape[1:]]}")
        return past.to("cpu", torch.float32)

    def estimate(self, upcoming: TokenBatch | None, past_KLE: Tensor) -> Estimate:
        """The load, from tokens if they are given, and the terms of its squared error."""
        return self._estimate(None if upcoming is None else self.predict(upcoming, past_KLE), past_KLE)

    def _estimate(self, prediction: Prediction | None, past_KLE: Tensor) -> Estimate:
        from_past, variance = self.from_history(past_KLE)
        if prediction is None:
            load, other = from_past, past_KLE[-1] if len(past_KLE) else from_past
        else:
            load, variance = prediction.load, prediction.variance
            other = from_past if len(past_KLE) else load
        other = other * load.sum(-1, keepdim=True) / other.sum(-1, keepdim=True).clamp(min=1e-9)
        return Estimate(load, torch.stack([variance, load**2, (load - other) ** 2]))

    @torch.inference_mode()
    def predict(self, upcoming: TokenBatch, past_KLE: Tensor) -> Prediction:
        """The network's output for a batch, given the loads `[K, L, E]` of the batches before it.

        Raises:
            ValueError: If a token id has no row in the embedding table.
        """
        ids, rows = upcoming.input_ids, self.layout.vocab_size if self.embedding is None else len(self.embedding)
        least = 0 if self.network.unknown is None else UNKNOWN
        if wrong := [number for number in (int(ids.max()), int(ids.min())) if not least <= number < rows]:
            raise ValueError(
                f"token id {wrong[0]} has no row in the table of {rows} embeddings; use the tokenizer of "
                f"{self.layout.model_id}"
            )
        x_BTD = self.network.embed(ids, self.embedding)
        prediction: Prediction = self.network(x_BTD, upcoming.mask, past_KLE, upcoming.computed)
        return prediction

    @torch.inference_mode()
    def from_history(self, past_KLE: Tensor) -> tuple[Tensor, Tensor]:
        """Load and variance `[L, E]` from past loads alone; zeros without any."""
        if not len(past_KLE):
            empty = torch.zeros(self.layout.num_layers, self.layout.num_experts)
            return empty, empty
        share = self.network.history.share(past_KLE)
        load = share * past_KLE[-1].sum(-1, keepdim=True)
        return load, load * (1 - self.layout.experts_per_token * share).clamp(min=0)
