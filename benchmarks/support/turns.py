"""What the arms of `benchmarks.tiers` did, turn by turn: summed up and shown."""

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
    """What an arm did in one turn, warm-up left out.

    Attributes:
        seconds: Of each batch.
        tokens: Of each batch, decoder included.
        stats: Counters at the end less those at the end of the warm-up; over ranks their sum, and the mean of times.
        resident_peak: Most bytes the processes grew by over what they held without any expert.
        fallbacks: Times the policy gave way to least-recently-used.
    """

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    stats: CacheStats = field(default_factory=CacheStats)
    resident_peak: int = 0
    fallbacks: int = 0


def over_ranks(stats: CacheStats, ranks: Ranks) -> CacheStats:
    """Counters of all ranks together; milliseconds are a rank's on average."""
    row = {name: float(value) for name, value in asdict(stats).items()}
    total = ranks.gather(torch.tensor(list(row.values()), dtype=torch.float64)).sum(0).tolist()
    sums: dict[str, Any] = dict(zip(row, total, strict=True))
    return CacheStats(
        **{name: value / ranks.world if name.endswith("_ms") else int(value) for name, value in sums.items()}
    )


def summarise(turns: list[Turn]) -> dict[str, Any]:
    """Medians over turns; the spread is that of tokens a second from turn to turn."""
    speeds = [sum(turn.tokens) / sum(turn.seconds) for turn in turns]
    tokens, batches = sum(turns[0].tokens), len(turns[0].seconds)
    tallies = [turn.stats for turn in turns]

    def median(read: Any) -> float:
        return float(np.median([read(stats) for stats in tallies]))

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


def show(results: dict[str, dict[str, Any]], title: str, console: Console) -> None:
    """The arms as a table."""
    table = Table(title=title)
    for name in (
        "arm",
        "tokens/s",
        "spread",
        "x LRU",
        "hits",
        "precision",
        "MB/token",
        "stall ms",
        "hidden",
        "peak GB",
    ):
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
