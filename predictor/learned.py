"""The network as a Forecaster: what the runtime holds. Needs torch alone.

Shape suffixes: K past batches, L MoE layers, E logical experts.
"""

import torch
from torch import Tensor, nn

from data.layout import MoELayout
from data.trace import TokenBatch
from predictor.familiarity import Familiarity
from predictor.forecast import LoadForecast, LoadHistory, forecast_from_load
from predictor.history import WINDOW
from predictor.model import LoadNetwork, Prediction


class LearnedForecaster:
    """Forecasts from the coming batch's tokens and past loads, or from past loads alone.

    Args:
        layout: The host model.
        network: The trained network.
        embedding: The host model's token embeddings, `[V, D]`.
        spread: Calibration of the spread: what the squared error is of the variance and of the squared load,
            with tokens known (0) and unknown (1), `[2, L, 2]`.
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
        if upcoming is not None and upcoming.num_tokens:
            prediction = self.predict(upcoming, past)
            load, variance = self._with_history(prediction, upcoming, past)
            spread = self.spread[0]
        else:
            load, variance = self.from_history(past)
            spread = self.spread[1]
        deviation = (spread[:, :1] * variance + spread[:, 1:] * load**2).sqrt()
        tokens = load.sum(-1, keepdim=True).clamp(min=1e-9)
        return forecast_from_load(
            load.double().numpy(), made_at=len(history), source=self.name, spread=(deviation / tokens).double().numpy()
        )

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

    def _with_history(self, prediction: Prediction, upcoming: TokenBatch, past_KLE: Tensor) -> tuple[Tensor, Tensor]:
        """Load and variance `[L, E]`: the network's, mixed with history's where the text is unfamiliar."""
        trust = 1.0 if self.familiarity is None or not len(past_KLE) else self.familiarity.trust(upcoming)
        if trust == 1.0:
            return prediction.load, prediction.variance
        history, _ = self.from_history(past_KLE)
        history = history * prediction.load.sum(-1, keepdim=True) / history.sum(-1, keepdim=True).clamp(min=1e-9)
        doubt = trust * (1 - trust) * (prediction.load - history) ** 2  # variance of a mixture of two
        return trust * prediction.load + (1 - trust) * history, prediction.variance + doubt

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
