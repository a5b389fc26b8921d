"""Rows measured with and without replicas (TensorRT-LLM's wide expert parallelism), and the loads behind them.

Each row says how many tokens reached the timed rank, the most loaded one, but not how many of their experts were there.
That is reconstructed. Loads are drawn from the row's power law and placed as the row was: each expert at home, or by
EPLB on 256 or 288 slots. Of many draws, those count in which about as many tokens reached the rank. With EPLB that
leaves hardly a doubt, because it evens loads out; without it the assignments of these draws still differ by about 9 %.

Shape suffixes: E experts, P slots, G ranks.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.arrays import FloatArray, IntArray
from runtime.balancing.eplb import rebalance_experts
from runtime.gpu.skew import power_law
from runtime.gpu.tables import MEASURED, column

DRAWS = {True: 20, False: 80}
"""Draws with EPLB, and without."""
LARGEST = 32
"""Largest EP size that was measured on 288 slots."""
PRECISION, EXPERTS, TOP_K = "fp8_block", 256, 8
"""Of all rows that are read."""


@cache
def replica_rows(gpu: str) -> pa.Table:
    """The rows of a GPU, from the excerpt.

    Columns: gpu, source, hidden_size, intermediate_size, eplb (whether EPLB placed the experts), slots, ep_size, power,
    tokens, assignments and active experts of the timed rank, milliseconds.
    """
    return pq.read_table(MEASURED / "replicas.parquet", filters=[("gpu", "=", gpu)])


def read_replica_rows(gpu: str, folder: Path) -> pa.Table:
    """The rows of a GPU, from the whole tables."""
    path = max((folder / gpu / "moe" / "trtllm").glob("*/wideep_moe_perf.parquet"))
    rows = pq.read_table(
        path, filters=[("num_experts", "=", EXPERTS), ("moe_dtype", "=", PRECISION), ("topk", "=", TOP_K)]
    )
    eplb = [name == "wideep_moe_eplb" for name in rows["op_name"].to_pylist()]
    power = [float(name.split("_")[2]) for name in rows["distribution"].to_pylist()]
    names = ("num_tokens", "moe_ep_size", "num_slots", "rank0_num_tokens")
    tokens, ranks, slots, reached = (column(rows, name).astype(int).tolist() for name in names)
    loads = [
        timed_rank(*draw, reached=count)
        for *draw, count in zip(tokens, ranks, slots, power, eplb, reached, strict=True)
    ]
    columns = {
        "gpu": [gpu] * len(rows), "source": [f"trtllm {path.parent.name}"] * len(rows),
        "hidden_size": rows["hidden_size"].cast(pa.int32()),
        "intermediate_size": rows["inter_size"].cast(pa.int32()), "eplb": eplb, "slots": pa.array(slots, pa.int32()),
        "ep_size": pa.array(ranks, pa.int32()), "power": pa.array(power, pa.float32()),
        "tokens": pa.array(tokens, pa.int32()),
        "assignments": pa.array([round(load[0]) for load in loads], pa.int32()),
        "active": pa.array([round(load[1], 1) for load in loads], pa.float32()),
        "milliseconds": rows["latency"].cast(pa.float32()),
    }  # fmt: skip
    return pa.table(columns)


def timed_rank(tokens: int, ranks: int, slots: int, power: float, eplb: bool, *, reached: int) -> tuple[float, float]:
    """Assignments and active experts of the timed rank, means over the draws that fit.

    Args:
        tokens: Tokens of the group.
        ranks: Its GPUs.
        slots: Places for experts on all of them.
        power: Exponent of the power law.
        eplb: Whether EPLB placed the experts.
        reached: Tokens that reached the timed rank.
    """
    drawn = _draws(tokens, ranks, slots, power, eplb)
    near = np.argsort(np.abs(drawn[:, 0] - reached), kind="stable")[: max(5, len(drawn) // 10)]
    return float(drawn[near, 1].mean()), float(drawn[near, 2].mean())


@cache
def _draws(tokens: int, ranks: int, slots: int, power: float, eplb: bool) -> FloatArray:
    """Tokens, assignments and active experts of the most loaded rank in each draw, `[draws, 3]`."""
    rng = np.random.default_rng([tokens, ranks, slots])
    found = []
    for _ in range(DRAWS[eplb]):
        load_E = power_law(rng, tokens, EXPERTS, TOP_K, power)
        load_P = _placed(load_E, slots, ranks) if eplb else load_E
        load_GP = load_P.reshape(ranks, -1)
        hot = int(load_GP.sum(-1).argmax())
        mine = np.repeat(np.arange(ranks) == hot, slots // ranks)
        found.append((_reached(load_P, mine, tokens), load_GP[hot].sum(), (load_GP[hot] > 0).sum()))
    return np.array(found, np.float64)


def _placed(load_E: IntArray, slots: int, ranks: int) -> IntArray:
    """Loads of the slots `[P]`: EPLB knows the loads, and an expert's tokens are spread evenly over its slots."""
    phy2log, _, count = (np.asarray(found)[0] for found in rebalance_experts(load_E[None], slots, 1, 1, ranks))
    share = load_E[phy2log] / count[phy2log]
    load_P = np.floor(share).astype(np.int64)
    odd = int(load_E.sum() - load_P.sum())
    load_P[np.argsort(load_P - share, kind="stable")[:odd]] += 1
    return np.asarray(load_P)


def _reached(load_P: IntArray, mine: np.ndarray, tokens: int) -> int:
    """Tokens with an expert among the slots that are mine.

    The tables dealt experts to tokens in one pass: the hottest slot takes the first tokens, the next one goes on where
    it ended, and after the last token the first one follows.
    """
    order = np.argsort(-load_P, kind="stable")
    end = np.cumsum(load_P[order])
    starts = np.zeros(tokens + 1, np.int64)
    for first, last in zip((end - load_P[order])[mine[order]], end[mine[order]], strict=True):
        begin, length = first % tokens, last - first
        starts[begin] += 1
        if begin + length <= tokens:
            starts[begin + length] -= 1
        else:
            starts[0] += 1
            starts[begin + length - tokens] -= 1
    return int((np.cumsum(starts[:tokens]) > 0).sum())
