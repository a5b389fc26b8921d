"""The network as a Forecaster: what the runtime holds. Needs torch alone.

Shape suffixes: K past batches, L MoE layers, E logical experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.models.layout import MoELayout
from data.traces.trace import TokenBatch
from predictor.familiarity import Familiarity
from predictor.forecast import LoadForecast, LoadHistory, forecast_from_load
from predictor.layers import WINDOW
from predictor.network import LoadNetwork, Prediction


class Estimate(NamedTuple):
    """A load and what its squared error may come from.

    Attributes:
        load: Expected dispatched tokens, `[L, E]`.
        terms: Chance in the tokens' choices, the squared load (a bias that grows with it), and the squared distance to
            what past loads say (to the last load, where past loads are all there is): news are less sure, `[3, L, E]`.
    """

    load: Tensor
    terms: Tensor


class NeuralForecaster:
    """Forecasts from the coming batch's tokens and past loads, or from past loads alone.

    Args:
        layout: The host model.
        network: The trained network.
        embedding: The host model's token embeddings, `[V, D]`.
        spread: Calibration of the spread: weights of the `Estimate`'s three terms in the squared error of a load, with
            tokens known (0) and unknown (1), `[2, L, 3]`.
        familiarity: Tells text of the kind the network was trained on; None trusts it on any text.
    """

    name = "learned"

    def __init__(
        self,
        layout: MoELayout,
        network: LoadNetwork,
        embedding: Tensor,
        spread: Tensor,
        familiarity: Familiarity | None = None,
    ) -> None:
        self.layout, self.network, self.embedding, self.spread = layout, network.eval(), embedding, spread
        self.familiarity = familiarity

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        """See `Forecaster`."""
        past = torch.from_numpy(history[-WINDOW:]).float()
        load, square = (
            self._from_tokens(upcoming, past) if upcoming is not None and upcoming.num_tokens else self._weighed(past)
        )
        tokens = load.sum(-1, keepdim=True).clamp(min=1e-9)
        spread = (square.sqrt() / tokens).double().numpy()
        return forecast_from_load(load.double().numpy(), made_at=len(history), source=self.name, spread=spread)

    def _from_tokens(self, upcoming: TokenBatch, past_KLE: Tensor) -> tuple[Tensor, Tensor]:
        """Load and its squared error, `[L, E]`: the network's, mixed with history's where the text is unfamiliar."""
        load, square = self._weighed(past_KLE, upcoming)
        trust = 1.0 if self.familiarity is None or not len(past_KLE) else self.familiarity.trust(upcoming)
        if trust == 1.0:
            return load, square
        history, history_square = self._weighed(past_KLE)
        factor = load.sum(-1, keepdim=True) / history.sum(-1, keepdim=True).clamp(min=1e-9)
        history = history * factor
        doubt = (
            trust * (1 - trust) * (load - history) ** 2
        )  # the variance of a mixture is theirs, and that of its means
        mixed_square = trust * square + (1 - trust) * factor**2 * history_square + doubt
        return trust * load + (1 - trust) * history, mixed_square

    def _weighed(self, past_KLE: Tensor, upcoming: TokenBatch | None = None) -> tuple[Tensor, Tensor]:
        """Load and its squared error, `[L, E]`."""
        load, terms = self.estimate(upcoming, past_KLE)
        return load, torch.einsum("ls,sle->le", self.spread[1 if upcoming is None else 0], terms)

    def estimate(self, upcoming: TokenBatch | None, past_KLE: Tensor) -> Estimate:
        """Load and what its error may come from, with the batch's tokens or without."""
        from_past, variance = self.from_history(past_KLE)
        if upcoming is None:
            load, other = from_past, past_KLE[-1] if len(past_KLE) else from_past
        else:
            prediction = self.predict(upcoming, past_KLE)
            load, variance = prediction.load, prediction.variance
            other = from_past if len(past_KLE) else load
        other = other * load.sum(-1, keepdim=True) / other.sum(-1, keepdim=True).clamp(min=1e-9)
        return Estimate(load, torch.stack([variance, load**2, (load - other) ** 2]))

    @torch.inference_mode()
    def predict(self, upcoming: TokenBatch, past_KLE: Tensor) -> Prediction:
        """What the network says about a batch, given the loads `[K, L, E]` of those before it.

        Raises:
            ValueError: If a token id has no row in the embedding table.
        """
        if (highest := int(upcoming.input_ids.max())) >= len(self.embedding):
            raise ValueError(f"token id {highest} has no row in the table of {len(self.embedding)} embeddings")
        x_BTD = nn.functional.embedding(upcoming.input_ids, self.embedding)
        prediction: Prediction = self.network(x_BTD, upcoming.mask, past_KLE)
        return prediction

    @torch.inference_mode()
    def from_history(self, past_KLE: Tensor) -> tuple[Tensor, Tensor]:
        """Load and variance `[L, E]` from past loads alone; with no past at all, no load."""
        if not len(past_KLE):
            empty = torch.zeros(self.layout.num_layers, self.layout.num_experts)
            return empty, empty
        share = self.network.history.share(past_KLE)
        load = share * past_KLE[-1].sum(-1, keepdim=True)
        return load, load * (1 - share)

    def route(self, upcoming: TokenBatch) -> Tensor:
        """The likeliest expert of each token in each encoder layer, int64 `[L_enc, B, T]`."""
        none = torch.zeros(0, self.layout.num_layers, self.layout.num_experts)
        return self.predict(upcoming, none).token_logits.argmax(-1).permute(2, 0, 1)
