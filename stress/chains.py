"""Chains of random cases in modes: run in this process or on several ranks, summed up, and shrunk where they fail."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.shell import typed
from runtime.distributed.ranks import Ranks
from stress.cases import Case, shrunk
from stress.layer_cases import LayerCase
from stress.layers import Found, run_layer_case
from stress.model_cases import ModelCase, run_model_case
from tests.helpers.processes import on_ranks

KINDS: dict[str, tuple[type[Case], Callable[..., Found]]] = {
    "layer": (LayerCase, run_layer_case), "model": (ModelCase, run_model_case),
}  # fmt: skip
RANK_CASES = 2500
"""Cases that one set of processes runs."""
HANGS_S = 300.0
"""Seconds after which a set of processes counts as hanging."""


@dataclass(frozen=True)
class Mode:
    """A part of the cases.

    Attributes:
        name: Its name in the table.
        share: Its share of all cases.
        kind: 'layer' or 'model'.
        fixed: Values that all its cases have.
    """

    name: str
    share: float
    kind: str
    fixed: dict[str, Any]

    @property
    def world(self) -> int:
        """Number of ranks."""
        return int(self.fixed.get("world", 1))


MODES = (
    Mode("layers, one process", 0.74, "layer", {"world": 1, "budget": 0}),
    Mode("layers, 2 ranks", 0.12, "layer", {"world": 2, "budget": 0}),
    Mode("layers, 4 ranks", 0.05, "layer", {"world": 4, "budget": 0}),
    Mode("layers within a budget, one process", 0.05, "layer", {"world": 1, "devices": 1}),
    Mode("layers within a budget, 2 ranks", 0.02, "layer", {"world": 2}),
    Mode("models, one process", 0.013, "model", {"world": 1}),
    Mode("models, 2 ranks", 0.004, "model", {"world": 2}),
    Mode("models, 4 ranks", 0.003, "model", {"world": 4}),
)


@dataclass
class Totals:
    """What many chains found.

    Attributes:
        chains: Chains that ran.
        cases: Cases that were compared.
        equal: Of these, equal to the bit.
        largest: Largest difference by dtype.
        moved: Plans that became active.
        dropped: Tokens that were dropped.
        failed: The first chain that failed, as text; None if none did.
        error: Its error.
    """

    chains: int = 0
    cases: int = 0
    equal: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    moved: int = 0
    dropped: int = 0
    failed: str | None = None
    error: str = ""

    def add(self, found: "Found | Totals", cases: int, chains: int) -> None:
        """Adds what further chains found."""
        self.chains += chains
        self.cases += cases
        self.equal += found.equal
        self.moved += found.moved
        self.dropped += found.dropped
        for dtype, value in found.largest.items():
            self.largest[dtype] = max(self.largest.get(dtype, 0.0), value)


def chain(mode: Mode, seed: int, number: int) -> Case:
    """A mode's chain by its number."""
    kind = KINDS[mode.kind][0]
    rng = np.random.default_rng([seed, MODES.index(mode), number])
    while True:
        case = kind.drawn(rng, **mode.fixed)
        if "budget" in mode.fixed or not isinstance(case, LayerCase) or case.budget:
            return case


def run_chains(rank: int, mode: Mode, seed: int, first: int, cases: int) -> Totals:
    """Runs chains on this rank, from a number on, until so many cases have been compared or one fails."""
    totals, run = Totals(), KINDS[mode.kind][1]
    with Ranks(timeout_s=20.0, device="cpu") if mode.kind == "layer" else nullcontext(Ranks(device="cpu")) as ranks:
        while totals.cases < cases:
            case = chain(mode, seed, first + totals.chains)
            try:
                found = run(case, ranks)
            except Exception as error:  # whatever it is, it is what this command looks for
                totals.failed, totals.error = str(case), f"{type(error).__name__}: {error}"
                return totals
            totals.add(found, found.compared, 1)
    return totals


def run_mode(mode: Mode, seed: int, cases: int, after: Callable[[int], None] = lambda cases: None) -> Totals:
    """Runs so many cases of a mode, or until the first failure.

    Args:
        mode: The mode.
        seed: Seed of all its chains.
        cases: Number of cases, at least.
        after: Called with the number of cases so far, from time to time.
    """
    totals = Totals()
    while totals.cases < cases and totals.failed is None:
        some = min(RANK_CASES, cases - totals.cases)
        if mode.world == 1:
            results: list[Any] = [run_chains(0, mode, seed, totals.chains, some)]
        else:
            results = on_ranks(mode.world, run_chains, mode, seed, totals.chains, some, timeout_s=HANGS_S)
        if broken := [result for result in results if not isinstance(result, Totals)]:
            totals.failed, totals.error = f"one of the chains from {totals.chains} on", str(broken)
            break
        totals.add(results[0], results[0].cases, results[0].chains)
        for result in results[1:]:  # the same cases, other sequences
            totals.largest |= {
                dtype: max(totals.largest.get(dtype, 0.0), value) for dtype, value in result.largest.items()
            }
        failures = [result for result in results if result.failed is not None]
        if failures:  # other ranks fail because one is gone
            earliest = min(failures, key=lambda result: (result.chains, is_consequence(result.error)))
            totals.failed, totals.error = earliest.failed, earliest.error
        after(totals.cases)
    return totals


def run_one(rank: int, kind: str, text: str) -> str:
    """The error of one case on this rank, "" if it passes."""
    case_of, run = KINDS[kind]
    try:
        with Ranks(timeout_s=20.0, device="cpu") if kind == "layer" else nullcontext(Ranks(device="cpu")) as ranks:
            run(case_of.parse(text), ranks)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def error_of(kind: str, case: Case) -> str:
    """The error of one case on all its ranks, "" if it passes."""
    world = getattr(case, "world", 1)
    if world == 1:
        return run_one(0, kind, str(case))
    results = on_ranks(world, run_one, kind, str(case), timeout_s=60.0)
    return min((str(result) for result in results if result != ""), key=is_consequence, default="")


def is_consequence(error: str) -> bool:
    """Whether an error only says that another rank is gone or elsewhere."""
    return "RankLost" in error or "gloo" in error


def reproducer(kind: str, text: str) -> tuple[str, str]:
    """The smallest failing case that is found from a failing one, as a command, and its error."""
    case_of = KINDS[kind][0]
    case, error = shrunk(case_of.parse(text), lambda case: error_of(kind, case))
    return typed(f"python -m stress.exactness --case {kind}:{case}"), error
