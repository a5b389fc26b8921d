"""Whether a batch's text is of a kind that the network was trained on: by how many of its tokens it met in training.

On text it does not know, a network that reads tokens can be wrong in the same way batch after batch, while past loads
are right until the topic changes. So trust passes from tokens to history as unfamiliar tokens grow more than usual.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from data.traces.trace import TokenBatch

OFTEN = 5
"""Occurrences in training from which a token counts as known."""
STEEPNESS = 12
"""How fast trust falls: (share of known tokens / the usual share) to this power."""


@dataclass(frozen=True)
class Familiarity:
    """Known tokens, and how many of them a batch usually has.

    Attributes:
        known: Whether the network met a token often in training, bool `[V]`.
        usual: Smallest share of known tokens among validation batches.
    """

    known: Tensor
    usual: float

    @classmethod
    def fit(cls, vocabulary: int, train: Iterable[TokenBatch], val: Iterable[TokenBatch]) -> "Familiarity":
        """Counts the tokens of training batches, then the known ones of validation batches."""
        counts = torch.zeros(vocabulary, dtype=torch.int64)
        for batch in train:
            counts += torch.bincount(batch.input_ids[batch.mask], minlength=vocabulary)
        known = counts >= OFTEN
        return cls(known, min(_share(known, batch) for batch in val))

    def trust(self, upcoming: TokenBatch) -> float:
        """Weight of the forecast from tokens, 0 to 1; the rest is history's."""
        if self.usual == 0:
            return 1.0
        return min(1.0, _share(self.known, upcoming) / self.usual) ** STEEPNESS


def _share(known: Tensor, batch: TokenBatch) -> float:
    """Share of a batch's real tokens that are known."""
    return float(known[batch.input_ids[batch.mask]].float().mean())
