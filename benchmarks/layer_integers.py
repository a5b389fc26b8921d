"""What the host computes for one MoE layer between the counts' arrival and the launch of its kernels, in microseconds.

    python -m benchmarks.layer_integers

Counts of all ranks to quotas (the split), and quotas to the indices of dispatch and combine, for one rank of several
with 64 experts, 16 replica slots and 2,048 tokens a rank of Zipf-distributed load; see docs/gpu.md. Of many calls the
tenth percentile is shown, because other programs on the machine only add to a call.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from data.cli import print_json
from predictor.forecast import forecast_from_load
from runtime.balancing.max_flow import least_time_quotas
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.balancing.planner import HomePlanner
from runtime.distributed.device import upload
from runtime.experts.dispatch import counts_of, plan_dispatch

EXPERTS, REDUNDANT, TOKENS, CALLS = 64, 16, 2048, 2000
CPU = torch.device("cpu")


def least_us(call: Callable[[], Any]) -> float:
    """Tenth percentile of the microseconds of many calls."""
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - began))
    return float(np.percentile(times, 10))


def measure(ranks: int) -> dict[str, float]:
    """Microseconds of the split, the indices, and everything with what lies between them, on rank 1."""
    rng = np.random.default_rng(0)
    share = rng.permutation(1 / np.arange(1, EXPERTS + 1) ** 0.8)
    counts_SE = rng.multinomial(TOKENS, share / share.sum(), size=ranks)
    load_LE, ends_SE = counts_SE.sum(0)[None], counts_SE.cumsum(1).astype(np.int32)
    home = ReplicationPlan.at_home(contiguous_homes(1, EXPERTS), ranks, REDUNDANT)
    forecast = forecast_from_load(load_LE.astype(float), made_at=0, source="oracle")
    phy2log = HomePlanner(ranks, REDUNDANT).plan(forecast, home, load_LE[None]).phy2log[0]
    slots = len(phy2log) // ranks
    layout = np.array([[0, slots]]), np.arange(slots), (1, slots + REDUNDANT // ranks), np.zeros(ranks, dtype=np.int64)

    def split(counts: Any, total: Any) -> Any:
        return least_time_quotas(counts, total, phy2log, ranks, 0, ranks)

    def everything() -> None:
        counts = counts_of(ends_SE)
        index, parts = plan_dispatch(split(counts, counts.sum(0)), phy2log, 1, *layout)
        upload(index, CPU).narrow(0, parts[0].ends_at, layout[2][1])

    quota_SP = split(counts_SE, counts_SE.sum(0))
    return {
        "split": least_us(lambda: split(counts_SE, load_LE[0])),
        "indices": least_us(lambda: plan_dispatch(quota_SP, phy2log, 1, *layout)),
        "all": least_us(everything),
    }


def main() -> None:
    """Prints a table and one JSON line."""
    found = {ranks: measure(ranks) for ranks in (2, 4, 8)}
    print("| ranks | split | indices | all, microseconds |\n| --- | --- | --- | --- |")
    for ranks, row in found.items():
        print(f"| {ranks} | {row['split']:.0f} | {row['indices']:.0f} | {row['all']:.0f} |")
    print_json({"torch": torch.__version__, "numpy": np.__version__, "seed": 0, "microseconds": found})


if __name__ == "__main__":
    main()
