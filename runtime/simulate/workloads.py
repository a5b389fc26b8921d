"""Made-up loads that drift in every way real ones might, seeded, as data for the simulator.

    python -m runtime.simulate.workloads outputs/workloads     # writes NAME.npz, key `counts`, [steps, layers, experts]
    python -m runtime.simulate outputs/workloads/hotspot.npz

FloatArray are drawn first, then tokens from the shares. Shape suffixes: N steps, L MoE layers, E logical experts.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from data.arrays import FloatArray, IntArray
from data.cli import user_errors
from predictor.baselines.history import LastBatch
from runtime.balancing.plan import ReplicationPlan, flat_homes
from runtime.balancing.planner import HomePlanner

STEPS, LAYERS, EXPERTS, TOKENS = 120, 4, 64, 4096
HOT = 4
"""Experts that are hot at the same time."""
HOT_SHARE = 0.6
"""Share of tokens that go to them."""


def uniform(rng: np.random.Generator) -> IntArray:
    """Every expert is as likely as any other."""
    return _draw(rng, np.full((STEPS, LAYERS, EXPERTS), 1 / EXPERTS))


def zipf(rng: np.random.Generator) -> IntArray:
    """The i-th expert of a layer gets a share that falls as 1 / i, always."""
    return _draw(rng, np.tile(_zipf(rng), (STEPS, 1, 1)))


def slow_drift(rng: np.random.Generator) -> IntArray:
    """From one Zipf order to another over the whole run."""
    way = np.linspace(0, 1, STEPS)[:, None, None]
    return _draw(rng, (1 - way) * _zipf(rng) + way * _zipf(rng))


def abrupt(rng: np.random.Generator) -> IntArray:
    """A new Zipf order every 30 steps."""
    return _draw(rng, np.concatenate([np.tile(_zipf(rng), (30, 1, 1)) for _ in range(STEPS // 30)]))


def hotspot(rng: np.random.Generator) -> IntArray:
    """The hot experts move on by four every 6 steps, and come round again."""
    first = np.arange(STEPS) // 6 * HOT
    return _draw(rng, np.stack([np.stack([_hot((start + np.arange(HOT)) % EXPERTS)] * LAYERS) for start in first]))


def burst(rng: np.random.Generator) -> IntArray:
    """A Zipf order, interrupted by single steps in which random experts are hot."""
    shares = np.tile(_zipf(rng), (STEPS, 1, 1))
    for step in np.flatnonzero(rng.random(STEPS) < 0.15):
        shares[step] = [_hot(rng.choice(EXPERTS, HOT, replace=False)) for _ in range(LAYERS)]
    return _draw(rng, shares)


def one_takes_all(rng: np.random.Generator) -> IntArray:
    """One expert of each layer gets every token."""
    return _draw(rng, np.tile(np.eye(EXPERTS)[rng.integers(0, EXPERTS, LAYERS)], (STEPS, 1, 1)))


def adversary(rng: np.random.Generator) -> IntArray:
    """After each re-plan from the last batch on 8 devices with 16 redundant experts, those without replicas get hot."""
    planner, loads = HomePlanner(8, 16), _draw(rng, np.full((1, LAYERS, EXPERTS), 1 / EXPERTS))
    plan = ReplicationPlan.at_home(flat_homes(loads[0].astype(np.float64), 8), 8, 16)
    for _ in range(STEPS - 1):
        plan = planner.plan(LastBatch().forecast(None, loads), plan, loads)
        bare = [rng.permutation(np.flatnonzero(copies == 1)) for copies in plan.copies]
        loads = np.concatenate([loads, _draw(rng, np.stack([_hot(experts[:HOT]) for experts in bare])[None])])
    return loads


WORKLOADS: dict[str, Callable[[np.random.Generator], IntArray]] = {
    made.__name__: made for made in (uniform, zipf, slow_drift, abrupt, hotspot, burst, one_takes_all, adversary)
}


def _zipf(rng: np.random.Generator) -> FloatArray:
    """Zipf shares in an order of each layer's own, `[L, E]`."""
    share = 1 / np.arange(1, EXPERTS + 1)
    return rng.permuted(np.tile(share / share.sum(), (LAYERS, 1)), axis=1)


def _hot(experts: IntArray) -> FloatArray:
    """A few experts share most tokens, the others the rest, `[E]`."""
    share = np.full(EXPERTS, (1 - HOT_SHARE) / (EXPERTS - len(experts)))
    share[experts] = HOT_SHARE / len(experts)
    return share


def _draw(rng: np.random.Generator, share: FloatArray) -> IntArray:
    """Loads of batches with `TOKENS` tokens drawn from shares `[N, L, E]`."""
    return np.asarray(rng.multinomial(TOKENS, share), dtype=np.int64)


def main() -> None:
    """Writes all workloads into a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime.simulate.workloads", description="Writes the drift workloads."
    )
    parser.add_argument("folder", type=Path, help="folder for NAME.npz")
    parser.add_argument("--seed", type=int, default=0, help="0 makes the workloads of docs/simulator.md")
    options = parser.parse_args()
    with user_errors():
        options.folder.mkdir(parents=True, exist_ok=True)
        for name in track(WORKLOADS, "workloads", console=Console(stderr=True)):
            np.savez_compressed(
                options.folder / f"{name}.npz", counts=WORKLOADS[name](np.random.default_rng(options.seed))
            )
        print(f"{len(WORKLOADS)} workloads in {options.folder}")


if __name__ == "__main__":
    main()
