"""Shelf: the places of a tier, and which expert is in which. Not for several threads at once: the tier locks."""

from collections.abc import Container

import numpy as np

from runtime.memory import Key, Place, Pool
from runtime.schedule import FloatArray


class Shelf:
    """Places of a pool by the experts in them.

    Attributes:
        due: Layers run until each expert is needed next, `[L, E]`; None as long as nobody said.
    """

    def __init__(self, pool: Pool) -> None:
        self.due: FloatArray | None = None
        self._places = pool.places
        self._where: dict[Key, Place] = {}

    def __len__(self) -> int:
        """Experts that are there or on their way."""
        return len(self._where)

    def get(self, key: Key) -> Place | None:
        """Where an expert is or will be."""
        return self._where.get(key)

    def has(self, key: Key) -> bool:
        """Whether an expert is there."""
        place = self._where.get(key)
        return place is not None and place.ready

    def due_of(self, key: Key | None) -> float:
        """When an expert is needed next; never for none."""
        if key is None:
            return float(np.inf)
        return 0.0 if self.due is None else float(self.due[key])

    def victim(self, wanted: Container[Key]) -> Place | None:
        """An empty place, or the one whose expert is due last of those that nobody wants; None if there is none."""
        best, latest = None, -np.inf
        for place in self._places:
            if place.key is None:
                return place
            if place.ready and place.key not in wanted and (due := self.due_of(place.key)) >= latest:
                best, latest = place, due
        return best

    def assign(self, place: Place, key: Key) -> None:
        """Gives an empty place to an expert on its way."""
        assert place.key is None, f"{place.key} is still there"
        place.key, self._where[key] = key, place

    def clear(self, place: Place) -> None:
        """Empties a place."""
        if place.key is not None:
            del self._where[place.key]
        place.key, place.ready, place.idle = None, False, False
