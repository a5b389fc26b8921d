"""A minute of `make stress`: some hundred random cases pass, and a planted fault is found and made small."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from runtime.experts.slots import ResidentSlots
from stress.cases import Case, one_of, shrunk
from stress.chains import KINDS, MODES, chain, error_of, reproducer, run_chains, run_mode
from stress.layer_cases import LayerCase
from stress.plain_loop import difference

pytestmark = [pytest.mark.stress, pytest.mark.usefixtures("one_thread")]
CASES = {"layers, one process": 400, "layers, 2 ranks": 60, "layers within a budget, one process": 60}


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_random_cases_equal_the_plain_loop(mode):
    cases = CASES.get(mode.name, 16)
    totals = run_mode(mode, 1, cases)
    assert totals.failed is None, f"{totals.error}\n{totals.failed}"
    assert totals.cases >= cases
    assert totals.moved > 0 or cases < 50  # in whole models plans may be late on a busy machine
    assert max(totals.largest.values()) < 0.03


def test_a_seed_gives_the_same_chains():
    assert [str(chain(MODES[0], 3, number)) for number in range(5)] == [str(chain(MODES[0], 3, n)) for n in range(5)]
    assert str(chain(MODES[0], 3, 0)) != str(chain(MODES[0], 4, 0))


def commit_nothing(self, slots):
    """Weights that have arrived never become active."""


def test_weights_that_do_not_become_active_are_found_and_the_case_is_made_small(monkeypatch):
    monkeypatch.setattr(ResidentSlots, "commit", commit_nothing)
    totals = run_chains(0, MODES[0], 0, 0, 400)
    assert totals.failed is not None
    command, error = reproducer("layer", totals.failed)
    assert error.startswith("AssertionError: outputs differ by")
    case = LayerCase.parse(command.partition("layer:")[2])
    assert (case.layers, case.width, case.form, case.dtype, case.padding) == (1, 4, "plain", "float32", "none")
    assert case.experts <= 2
    assert case.devices <= 4
    assert error_of("layer", case) == error
    monkeypatch.undo()
    assert error_of("layer", case) == ""


@dataclass(frozen=True)
class Sum(Case):
    """An example."""

    numbers: int = one_of(1, 2, 5, 9)
    sign: str = one_of("plus", "minus")

    @property
    def possible(self) -> bool:
        return self.numbers != 2 or self.sign == "plus"


def test_a_case_is_drawn_written_read_and_made_small():
    cases = [Sum.drawn(np.random.default_rng(seed)) for seed in range(20)]
    assert all(case.possible and Sum.parse(str(case)) == case for case in cases)
    assert {case.numbers for case in cases} == {1, 2, 5, 9}
    smallest, error = shrunk(Sum(7, 9, "minus"), lambda case: "too large" if case.numbers > 2 else "")
    assert (str(smallest), error) == ("seed=7,numbers=5", "too large")
    with pytest.raises(ValueError, match="'colour' is no value of a Sum, expected one of seed, numbers, sign"):
        Sum.parse("seed=1,colour=red")


def test_a_difference_counts_what_is_not_a_number():
    one = torch.ones(2, 3)
    assert difference(one, one) == 0
    assert difference(one * 4, one * 8) == 0.5
    assert difference(one / one.new_zeros(1), one) == float("inf")
    assert difference(one * float("nan"), one) == float("inf")
    assert difference(one[:1], one) == float("inf")


def test_every_kind_has_a_mode():
    assert {mode.kind for mode in MODES} == set(KINDS)
    assert sum(mode.share for mode in MODES) == pytest.approx(1)
