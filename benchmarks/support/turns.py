"""Measurements of the arms of `benchmarks.tiers`: collected turn by turn, summarised, and printed as a table."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from runtime.distributed.ranks import Ranks
from runtime.offload.stats import CacheStats


@dataclass
class Turn:
    """Measurements of one arm in one turn, without the warm-up batches.

    Attributes:
        seconds: Duration of each batch.
        tokens: Tokens of each batch, decoder included.
        stats: Counters since the warm-up; summed over ranks, times averaged over them.
        resident_peak: Bytes by which the processes grew at most, relative to holding no expert.
        fallbacks: Number of times the policy fell back to LRU.
    """

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    stats: CacheStats = field(default_factory=CacheStats)
    resident_peak: int = 0
    fallbacks: int = 0


def stats_since(stats: CacheStats, earlier: CacheStats) -> CacheStats:
    """Counters minus those of an earlier copy; `peak_bytes` stays the peak since the tier was opened."""
    before = asdict(earlier) | {"peak_bytes": 0}
    return CacheStats(**{name: value - before[name] for name, value in asdict(stats).items()})


def over_ranks(stats: CacheStats, ranks: Ranks) -> CacheStats:
    """Counters summed over all ranks; milliseconds are averaged."""
    row = {name: float(value) for name, value in asdict(stats).items()}
    total = ranks.gather(torch.tensor(list(row.values()), dtype=torch.float64)).sum(0).tolist()
    sums: dict[str, Any] = dict(zip(row, total, strict=True))
    return CacheStats(
        **{name: value / ranks.world if name.endswith("_ms") else int(value) for name, value in sums.items()}
    )


def summarise(turns: list[Turn]) -> dict[str, Any]:
    """Medians over turns; `spread` is the slowest and the fastest turn in tokens per second."""
    speeds = [sum(turn.tokens) / sum(turn.seconds) for turn in turns]
    tokens, batches = sum(turns[0].tokens), len(turns[0].seconds)

    def median(read: Any) -> float:
        return float(np.median([read(turn.stats) for turn in turns]))

    return {
        "tokens_per_s": round(float(np.median(speeds)), 1),
        "spread": [round(min(speeds), 1), round(max(speeds), 1)],
        "hit_rate": round(median(lambda stats: stats.hit_rate), 3),
        "bytes_per_token": round(median(lambda stats: stats.demand_bytes + stats.prefetch_bytes) / tokens),
        "demand_bytes": median(lambda stats: stats.demand_bytes),
        "prefetch_bytes": median(lambda stats: stats.prefetch_bytes),
        "prefetch_precision": round(median(lambda stats: stats.precision), 3),
        "stall_ms": round(median(lambda stats: stats.stall_ms) / batches, 1),
        "load_ms": round(median(lambda stats: stats.load_ms) / batches, 1),
        "hidden": round(median(lambda stats: stats.hidden), 3),
        "batch_ms": round(1e3 * float(np.median([sum(turn.seconds) / batches for turn in turns])), 1),
        "peak_bytes": int(median(lambda stats: stats.peak_bytes)),
        "resident_bytes": int(np.median([turn.resident_peak for turn in turns])),
        "fallbacks": sum(turn.fallbacks for turn in turns),
    }


COLUMNS = ("arm", "tokens/s", "spread", "x LRU", "hits", "precision", "MB/token", "stall ms", "hidden", "peak GB")


def show(results: dict[str, dict[str, Any]], title: str, console: Console) -> None:
    """Prints the arms as a table."""
    table = Table(title=title)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    base = results.get("lru", {}).get("tokens_per_s")
    for arm, row in results.items():
        table.add_row(
            arm, f"{row['tokens_per_s']:.1f}", "-".join(f"{speed:.0f}" for speed in row["spread"]),
            f"{row['tokens_per_s'] / base:.2f}" if base else "-", f"{row['hit_rate']:.1%}",
            f"{row['prefetch_precision']:.1%}" if row["prefetch_bytes"] else "-", f"{row['bytes_per_token'] / 1e6:.2f}",
            f"{row['stall_ms']:.0f}", f"{row['hidden']:.0%}", f"{row['resident_bytes'] / 1e9:.2f}",
        )  # fmt: skip
    console.print(table)
