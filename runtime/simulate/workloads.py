"""Synthetic expert loads for the simulator: steady, drifting, bursting and adversarial, from a seed.

    python -m runtime.simulate.workloads outputs/workloads     # writes NAME.npz, key `counts`, [steps, layers, experts]
    python -m runtime.simulate outputs/workloads/hotspot.npz

Each workload draws shares first, then tokens from the shares. Shape suffixes: N steps, L MoE layers, E logical experts.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.arrays import FloatArray, IntArray
from data.cli import from_command_line, user_errors
from data.files import whole_file
from data.progress import track
from runtime.balancing.balancer import Balancer

STEPS, LAYERS, EXPERTS, TOKENS = 120, 4, 64, 4096
HOT = 4
"""Number of experts that are hot at the same time."""
HOT_SHARE = 0.6
"""Share of tokens (0 to 1) that go to the hot experts."""


def uniform(rng: np.random.Generator) -> IntArray:
    """Every expert is as likely as any other."""
    return _draw(rng, np.full((STEPS, LAYERS, EXPERTS), 1 / EXPERTS))


def zipf(rng: np.random.Generator) -> IntArray:
    """The i-th expert of a layer gets a share that falls as 1 / i, at every step."""
    return _draw(rng, np.tile(_zipf(rng), (STEPS, 1, 1)))


def slow_drift(rng: np.random.Generator) -> IntArray:
    """From one Zipf order to another over the whole run."""
    way = np.linspace(0, 1, STEPS)[:, None, None]
    return _draw(rng, (1 - way) * _zipf(rng) + way * _zipf(rng))


def abrupt(rng: np.random.Generator) -> IntArray:
    """A new Zipf order every 30 steps."""
    return _draw(rng, np.concatenate([np.tile(_zipf(rng), (30, 1, 1)) for _ in range(STEPS // 30)]))


def hotspot(rng: np.random.Generator) -> IntArray:
    """The hot experts move on by four every 6 steps, and start again after the last expert."""
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
    """After each plan from the last batch (8 devices, 16 redundant experts), experts without replicas get hot."""
    balancer = Balancer(8, 16, "last")
    loads = [_draw(rng, np.full((LAYERS, EXPERTS), 1 / EXPERTS))]
    for _ in range(STEPS - 1):
        plan = balancer.step(loads[-1])
        single = [rng.permutation(np.flatnonzero(count == 1)) for count in plan.replica_count]
        loads.append(_draw(rng, np.stack([_hot(experts[:HOT]) for experts in single])))
    return np.stack(loads)


WORKLOADS: dict[str, Callable[[np.random.Generator], IntArray]] = {
    made.__name__: made for made in (uniform, zipf, slow_drift, abrupt, hotspot, burst, one_takes_all, adversary)
}


def _zipf(rng: np.random.Generator) -> FloatArray:
    """Zipf shares, the experts of each layer in a random order, `[L, E]`."""
    share = 1 / np.arange(1, EXPERTS + 1)
    return rng.permuted(np.tile(share / share.sum(), (LAYERS, 1)), axis=1)


def _hot(experts: IntArray) -> FloatArray:
    """Shares where a few experts get most tokens and the others the rest, `[E]`."""
    share = np.full(EXPERTS, (1 - HOT_SHARE) / (EXPERTS - len(experts)))
    share[experts] = HOT_SHARE / len(experts)
    return share


def _draw(rng: np.random.Generator, share: FloatArray) -> IntArray:
    """Loads of batches with `TOKENS` tokens drawn from shares `[..., L, E]`."""
    return np.asarray(rng.multinomial(TOKENS, share), dtype=np.int64)


def write_workloads(folder: Path, seed: int = 0) -> None:
    """Writes all workloads into a folder, as NAME.npz with the key `counts`.

    Args:
        folder: Folder to write into.
        seed: 0 makes the workloads of docs/simulator.md.
    """
    for name in track(WORKLOADS, "workloads"):
        with whole_file(folder / f"{name}.npz") as aside, aside.open("wb") as file:
            np.savez_compressed(file, counts=WORKLOADS[name](np.random.default_rng(seed)))
    print(f"{len(WORKLOADS)} workloads in {folder}")


def main() -> None:
    """Command line of `write_workloads`."""
    with user_errors():
        from_command_line(write_workloads)


if __name__ == "__main__":
    main()
