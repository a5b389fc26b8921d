"""Fetch: one expert on its way from the tier below into a place; and what a tier is filled from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from runtime.disk import never
from runtime.memory import Key, Place


class Source(Protocol):
    """What a tier is filled from."""

    def has(self, key: Key) -> bool:
        """Whether it has the expert at hand, so that a prefetch need not wait for a tier further below."""
        ...

    def read(self, key: Key, place: Place, stop: Callable[[], bool] = never) -> None:
        """Brings an expert into a place, on the calling thread; see `ExpertFiles.read`."""
        ...


@dataclass(frozen=True)
class Fetch:
    """One expert on its way into a place.

    Attributes:
        key: The expert.
        place: Where it goes.
        ahead: Whether nobody waits for it: a prefetch.
    """

    key: Key
    place: Place
    ahead: bool
