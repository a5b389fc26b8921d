"""CacheStats: what a tier of experts did, counted."""

from dataclasses import asdict, dataclass, replace


@dataclass
class CacheStats:
    """What a tier did since it was opened.

    Attributes:
        hits: Experts asked for that were there.
        late: Experts asked for that were on their way.
        misses: Experts asked for that were neither.
        demand_bytes: Bytes loaded because somebody waited.
        prefetch_bytes: Bytes loaded ahead.
        useful_prefetches: Prefetched experts that were used before they were evicted.
        wasted_prefetches: Prefetched experts that were not.
        demands: Loads on demand.
        prefetches: Loads ahead.
        cancelled: Loads ahead that were given up because somebody waited for another expert.
        failed: Loads that failed.
        stall_ms: Milliseconds somebody waited.
        load_ms: Milliseconds at least one load was under way.
        peak_bytes: Most bytes of experts held at once.
    """

    hits: int = 0
    late: int = 0
    misses: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    useful_prefetches: int = 0
    wasted_prefetches: int = 0
    demands: int = 0
    prefetches: int = 0
    cancelled: int = 0
    failed: int = 0
    stall_ms: float = 0.0
    load_ms: float = 0.0
    peak_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were there."""
        return self.hits / max(self.hits + self.late + self.misses, 1)

    @property
    def costs(self) -> int:
        """Experts that were not there when asked for, and prefetches that nobody used."""
        return self.late + self.misses + self.wasted_prefetches

    @property
    def precision(self) -> float:
        """Share of prefetched experts that were used, among those whose fate is known."""
        return self.useful_prefetches / max(self.useful_prefetches + self.wasted_prefetches, 1)

    @property
    def hidden(self) -> float:
        """Share of the loading time that nobody waited for."""
        return max(0.0, 1 - self.stall_ms / self.load_ms) if self.load_ms else 1.0

    def to_json(self) -> dict[str, int | float]:
        """All counters and what follows from them."""
        rates = {"hit_rate": self.hit_rate, "prefetch_precision": self.precision, "hidden": self.hidden}
        return asdict(self) | rates

    def copy(self) -> "CacheStats":
        """As it stands."""
        return replace(self)

    def since(self, earlier: "CacheStats") -> "CacheStats":
        """What was added to an earlier copy; the peak is that of all time."""
        before = asdict(earlier) | {"peak_bytes": 0}
        return CacheStats(**{name: value - before[name] for name, value in asdict(self).items()})
