"""CacheStats: hits, misses, prefetches, bytes and waiting times of one tier."""

from dataclasses import asdict, dataclass


@dataclass
class CacheStats:
    """Counters of a tier since it was opened.

    Attributes:
        hits: Requests for an expert that was resident.
        late: Requests for an expert that was being loaded.
        misses: Requests for an expert that was neither.
        demand_bytes: Bytes of demand loads.
        prefetch_bytes: Bytes of prefetches.
        useful_prefetches: Prefetched experts that were used before they were evicted.
        wasted_prefetches: Prefetched experts that were evicted unused.
        demands: Demand loads.
        prefetches: Prefetches that finished.
        cancelled: Prefetches cancelled in favour of a demand load, and loads cancelled by closing the tier.
        failed: Loads that raised an error.
        stall_ms: Milliseconds that callers waited for experts.
        load_ms: Milliseconds during which at least one load was running.
        peak_bytes: Largest number of bytes in use at once.
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
        """Share of requests whose expert was resident (0 to 1)."""
        return self.hits / max(self.hits + self.late + self.misses, 1)

    @property
    def costs(self) -> int:
        """Experts that were not resident when requested, plus wasted prefetches."""
        return self.late + self.misses + self.wasted_prefetches

    @property
    def precision(self) -> float:
        """Share of prefetched experts that were used (0 to 1), among those used or evicted so far."""
        return self.useful_prefetches / max(self.useful_prefetches + self.wasted_prefetches, 1)

    @property
    def hidden(self) -> float:
        """Share of the loading time during which no caller waited (0 to 1)."""
        return max(0.0, 1 - self.stall_ms / self.load_ms) if self.load_ms else 1.0

    def to_json(self) -> dict[str, int | float]:
        """All counters, and the three rates as `hit_rate`, `prefetch_precision` and `hidden`."""
        rates = {"hit_rate": self.hit_rate, "prefetch_precision": self.precision, "hidden": self.hidden}
        return asdict(self) | rates
