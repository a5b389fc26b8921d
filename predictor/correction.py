"""CorrectionMemory: corrects a forecast by what was observed of similar sequences. Numpy only.

A network is wrong on unfamiliar text in the same way as long as that text lasts, and again when it returns. The memory
keeps, for each of the last sequences, its forecast load and its observed load. A new sequence's forecast is multiplied
by the ratio observed / forecast of the sequences whose forecasts resemble its own (kernel regression on ratios), so
that text of one kind does not correct text of another. Sequences of the same request count in full. Several forecasters
may be corrected at once; the forecasts of the first tell which sequences resemble each other.

Shape suffixes: C forecasters, B sequences, N remembered sequences, L MoE layers, E logical experts.
"""

import numpy as np

from data.arrays import Float32Array, IntArray

CAPACITY = 512
"""Most sequences remembered."""
MOST_BYTES = 64 * 2**20
"""Most bytes of the memory; large models get fewer sequences."""
NEAR, FAR = 0.03, 0.1
"""Hellinger distances (0 to 1) at which the weight of a remembered sequence falls to 1 / e, in two corrections."""
STRENGTH = 100.0
"""Assignments a layer that the uncorrected forecast counts as, beside those of the remembered sequences."""
UNNAMED = -1
"""Request of a sequence whose request is not known, or of one remembered from an earlier run."""


class CorrectionMemory:
    """Forecast and observed loads of the last sequences.

    Args:
        num_layers: L.
        num_experts: E.
        num_forecasters: C.
    """

    def __init__(self, num_layers: int, num_experts: int, num_forecasters: int = 1) -> None:
        width = num_layers * num_experts
        self.capacity = max(min(CAPACITY, MOST_BYTES // (4 * (num_forecasters + 2) * width)), 1)
        self.shape = num_layers, num_experts
        self.count = 0
        """Sequences remembered so far; those beyond the capacity took the place of the oldest."""
        self._forecast = np.zeros((num_forecasters, self.capacity, width), np.float32)
        self._observed, self._key = (np.zeros((self.capacity, width), np.float32) for _ in range(2))
        self._requests = np.full(self.capacity, UNNAMED)

    def __len__(self) -> int:
        return min(self.count, self.capacity)

    def correct(
        self, forecast_CBLE: Float32Array, requests_B: IntArray | None = None
    ) -> tuple[Float32Array, Float32Array]:
        """The forecast loads of sequences, corrected in two ways; each layer of a sequence keeps its sum.

        The cautious correction uses close sequences and is shrunk towards the forecast. The bold one is shrunk towards
        the correction by all sequences that are not far, which itself is shrunk towards the forecast.
        """
        size = len(self)
        if not size or not forecast_CBLE.shape[1]:
            return forecast_CBLE, forecast_CBLE
        total = forecast_CBLE.sum(-1, keepdims=True)
        share = forecast_CBLE / np.maximum(total, 1e-9)
        distance_BN = _distance(_key(forecast_CBLE[0]), self._key[:size], self.shape[0])
        near = np.exp(distance_BN / np.float32(-NEAR))
        if requests_B is not None:
            near += (requests_B[:, None] == self._requests[:size]) & (requests_B[:, None] != UNNAMED)
        found = self._weighted(near)
        around = _shrunk(share, share, *self._weighted(np.exp(distance_BN / np.float32(-FAR))))
        return total * _shrunk(share, share, *found), total * _shrunk(share, around, *found)

    def _weighted(self, weight_BN: Float32Array) -> tuple[Float32Array, Float32Array]:
        """Weighted sums of the remembered sequences' observed loads `[B, L, E]` and forecasts `[C, B, L, E]`."""
        size, shape = weight_BN.shape[1], (len(weight_BN), *self.shape)
        observed = weight_BN @ self._observed[:size]
        return observed.reshape(shape), (weight_BN @ self._forecast[:, :size]).reshape(-1, *shape)

    def add(self, forecast_CBLE: Float32Array, observed_BLE: Float32Array, requests_B: IntArray | None = None) -> None:
        """Remembers sequences: their forecast loads, scaled to as many tokens as were observed, and observed loads."""
        observed = observed_BLE[-self.capacity :]
        forecast = forecast_CBLE[:, -self.capacity :]
        forecast = forecast * (observed.sum(-1, keepdims=True) / np.maximum(forecast.sum(-1, keepdims=True), 1e-9))
        rows = (self.count + np.arange(len(observed))) % self.capacity
        self._forecast[:, rows] = forecast.reshape(*forecast.shape[:2], -1)
        self._observed[rows] = observed.reshape(len(rows), -1)
        self._key[rows] = _key(forecast[0])
        self._requests[rows] = UNNAMED if requests_B is None else requests_B[-self.capacity :]
        self.count += len(rows)

    def state(self) -> dict[str, Float32Array]:
        """Forecasts `[C, N, L, E]` and observed loads `[N, L, E]` of the remembered sequences, oldest first."""
        order = (self.count + np.arange(-len(self), 0)) % self.capacity
        return {
            "forecast": self._forecast[:, order].reshape(-1, len(order), *self.shape),
            "observed": self._observed[order].reshape(-1, *self.shape),
        }

    def restore(self, state: dict[str, Float32Array]) -> None:
        """Remembers the sequences of a `state`; their requests are over."""
        self.add(state["forecast"], state["observed"])


def _shrunk(share: Float32Array, prior: Float32Array, observed: Float32Array, expected: Float32Array) -> Float32Array:
    """Shares `[C, B, L, E]` times observed / expected load, with `STRENGTH` assignments of the prior shares."""
    ratio = (observed + np.float32(STRENGTH) * prior) / np.maximum(expected + np.float32(STRENGTH) * share, 1e-9)
    corrected = share * ratio
    scaled: Float32Array = corrected / np.maximum(corrected.sum(-1, keepdims=True), 1e-9)
    return scaled


def attributed(forecast_BLE: Float32Array, load_LE: IntArray) -> Float32Array:
    """Observed loads of a batch's sequences where only the batch's is known, `[B, L, E]`.

    Each sequence is taken to have the batch's ratio of observed and forecast load, with one assignment added to both.
    """
    total = forecast_BLE.sum(0)
    scale = load_LE.sum(-1, keepdims=True) / np.maximum(total.sum(-1, keepdims=True), 1e-9)
    ratio = (load_LE + 1.0) / (total * scale + 1.0)
    attributed: Float32Array = (forecast_BLE * scale * ratio).astype(np.float32)
    return attributed


def _key(load_BLE: Float32Array) -> Float32Array:
    """Square roots of the shares, `[B, L * E]`: their products are Bhattacharyya coefficients."""
    key: Float32Array = np.sqrt(load_BLE / np.maximum(load_BLE.sum(-1, keepdims=True), 1e-9)).reshape(len(load_BLE), -1)
    return key


def _distance(key_BD: Float32Array, other_ND: Float32Array, num_layers: int) -> Float32Array:
    """Hellinger distance of shares (0 to 1), root mean square over layers, `[B, N]`."""
    distance: Float32Array = np.sqrt(np.maximum(1 - key_BD @ other_ND.T / np.float32(num_layers), 0))
    return distance
