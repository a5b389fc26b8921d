"""Familiarity: how far a batch's text resembles the training text, by the share of its tokens seen in training.

On unfamiliar text a network that reads tokens can be wrong in the same way batch after batch, while past loads are
right until the topic changes. The weight of the token forecast therefore falls, and the weight of history rises, as
the share of unknown tokens exceeds the usual one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from data.traces.trace import UNKNOWN, TokenBatch

MIN_OCCURRENCES = 5
"""Occurrences in the training batches that make a token known."""
STEEPNESS = 12
"""Exponent of the trust: (share of known tokens / usual share) ** STEEPNESS."""


@dataclass(frozen=True)
class Familiarity:
    """The known tokens, and the share of a batch that they usually make up.

    Attributes:
        known: Whether a token occurred at least `MIN_OCCURRENCES` times in training, bool `[V]`.
        usual: Smallest share of known tokens (0 to 1) among the validation batches.
    """

    known: Tensor
    usual: float

    @classmethod
    def fit(cls, vocabulary: int, train: Iterable[TokenBatch], val: Iterable[TokenBatch]) -> "Familiarity":
        """Finds the known tokens in the training batches and their usual share in the validation batches."""
        counts = torch.zeros(vocabulary, dtype=torch.int64)
        for batch in train:
            ids = batch.input_ids[batch.computed]
            counts += torch.bincount(ids[ids != UNKNOWN], minlength=vocabulary)
        known = counts >= MIN_OCCURRENCES
        return cls(known, min(_known_share(known, batch) for batch in val))

    def trust(self, upcoming: TokenBatch) -> float:
        """Weight of the forecast from tokens, 0 to 1; the remainder is the weight of history.

        With a usual share of 0.8, a batch with half of its tokens known gets (0.5 / 0.8) ** 12 = 0.004.
        """
        if self.usual == 0:
            return 1.0
        return min(1.0, _known_share(self.known, upcoming) / self.usual) ** STEEPNESS


def _known_share(known: Tensor, batch: TokenBatch) -> float:
    """Share of known tokens among a batch's tokens and their context; 1 where all are still to be written."""
    ids = batch.input_ids[batch.mask]
    written = ids[ids != UNKNOWN]
    return float(known[written].float().mean()) if len(written) else 1.0
