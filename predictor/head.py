"""LearningHead: a linear correction of a network's forecast that is fitted while serving. Numpy only.

A trained network ends in one linear layer for each MoE layer. On text unlike its training text that layer is wrong,
but the features before it still tell sequences apart. The head regresses the error of a sequence's forecast shares on
the sequence's features: ridge regression, older batches counting less. Where only a batch's load is known, the head
learns from that load attributed to the sequences, and learns less.

Shape suffixes: B sequences, F features, L MoE layers, E logical experts.
"""

import numpy as np

from data.arrays import Float32Array

DISCOUNT = 0.97
"""Weight of a batch's sequences, relative to those of the batch after it."""
PENALTY = 100.0
"""Sequences without error that the penalty on each weight counts as, if their features are of the usual size."""


class LearningHead:
    """Weights from the features of a sequence, and a constant, to a correction of its shares.

    Kept are two sums over the sequences observed so far, `[F, F]` and `[F, L * E]`; the weights follow from them.

    Args:
        num_layers: L.
        num_experts: E.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.shape = num_layers, num_experts
        self.products: Float32Array | None = None
        """Discounted sum of the products of two features, the constant last; None before the first batch."""
        self.residuals: Float32Array | None = None
        """Discounted sum of the products of a feature and an error of a share."""

    def correct(self, load_BLE: Float32Array, features_BF: Float32Array) -> Float32Array:
        """The forecast loads of sequences, corrected; each layer of a sequence keeps its sum."""
        if self.products is None or self.residuals is None:
            return load_BLE
        usual = np.diagonal(self.products) / self.products[-1, -1]
        penalised = self.products + np.diag(PENALTY * usual + np.float32(1e-6))
        used_FB = np.linalg.solve(penalised, _with_constant(features_BF).T)  # cheaper than solving for the weights
        total, share = load_BLE.sum(-1, keepdims=True), _share(load_BLE)
        corrected = np.maximum(share + (used_FB.T @ self.residuals).reshape(load_BLE.shape), 0)
        loads: Float32Array = total * _share(corrected)
        return loads

    def learn(self, forecast_BLE: Float32Array, observed_BLE: Float32Array, features_BF: Float32Array) -> None:
        """Learns from the forecast and observed loads of sequences; a layer without load counts as forecast rightly."""
        error = (_share(observed_BLE) - _share(forecast_BLE)) * (observed_BLE.sum(-1, keepdims=True) > 0)
        features = _with_constant(features_BF)
        products, residuals = features.T @ features, features.T @ error.reshape(len(error), -1)
        if self.products is not None and self.residuals is not None:
            products += np.float32(DISCOUNT) * self.products
            residuals += np.float32(DISCOUNT) * self.residuals
        self.products, self.residuals = products, residuals

    def state(self) -> dict[str, Float32Array]:
        """Both sums, `[F, F]` and `[F, L, E]`; nothing before the first batch."""
        if self.products is None or self.residuals is None:
            return {}
        return {"products": self.products, "residuals": self.residuals.reshape(-1, *self.shape)}

    def restore(self, state: dict[str, Float32Array]) -> None:
        """Goes on from a `state`."""
        if state:
            products, residuals = state["products"], state["residuals"]
            self.products, self.residuals = products, residuals.reshape(len(products), -1)


def _with_constant(features_BF: Float32Array) -> Float32Array:
    """The features and, as the last one, 1."""
    return np.concatenate([features_BF, np.ones((len(features_BF), 1), np.float32)], axis=1)


def _share(load_BLE: Float32Array) -> Float32Array:
    """Loads divided by their sum over experts; zeros in a layer without load."""
    share: Float32Array = load_BLE / np.maximum(load_BLE.sum(-1, keepdims=True), np.float32(1e-9))
    return share
