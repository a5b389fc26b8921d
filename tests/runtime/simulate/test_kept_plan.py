from dataclasses import replace

import numpy as np
import pytest

from runtime.simulate import compare_policies
from runtime.simulate.cost_model import Hardware

HARDWARE = Hardware(1e6, tokens_per_second=1e3, bytes_per_second=1e6, expert_overhead_tokens=0)
"""A token takes a millisecond, and an expert moves in a second."""


def skewed(hot, steps):
    """Loads of one layer of 8 experts, `[N, 1, 8]`: 4,000 tokens for one of them, 200 for each other."""
    load = np.full((steps, 1, 8), 200)
    load[:, 0, hot] = 4000
    return load


def plans(loads, renew_every=1000, hardware=HARDWARE):
    """What `engines` of the report says, the plans by way and planner."""
    report = compare_policies(loads, 4, 4, "last", ("home",), ("even",), hardware=hardware, renew_every=renew_every)
    engines = report["engines"]
    return engines, {(plan["way"], plan["planner"]): plan for plan in engines["plans"]}


def test_a_plan_is_made_from_the_first_quarter_and_judged_on_the_rest():
    """Of 40 steps, 10 are hot on expert 0: the plan suits them, and not the 30 after, which are hot on expert 5."""
    engines, found = plans(np.concatenate([skewed(0, 11), skewed(5, 30)]))
    assert (engines["made_from"], engines["judged_on"]) == (10, 30)
    assert found.keys() == {("kept", "few moves"), ("kept", "eplb")}
    assert found["kept", "few moves"]["layer_ms"]["without"] == 4200
    assert found["kept", "few moves"]["net_gain"] < 0.1
    assert found["kept", "few moves"]["moves_per_layer"] == 0


def test_steady_loads_gain_what_an_even_split_can_give():
    """Three devices hold the hot expert, 1,333 tokens each: all 5,400 tokens over 4 devices are 1,350."""
    _, found = plans(skewed(0, 41))
    assert found["kept", "few moves"]["answer"] == "enable"
    assert found["kept", "few moves"]["net_gain"] == pytest.approx(1 - 1533 / 4200, abs=0.06)


def test_a_renewed_plan_follows_and_pays_for_its_moves():
    """Renewed 10 and 20 steps after the first: from 10 hot steps of each kind, then 20 of the new one."""
    loads = np.concatenate([skewed(0, 11), skewed(5, 30)])
    _, found = plans(loads, renew_every=10)
    kept, renewed = found["kept", "few moves"], found["renewed", "few moves"]
    assert renewed["balancedness"] > kept["balancedness"] + 0.1
    at_once = plans(loads, 10, replace(HARDWARE, bytes_per_second=1e12))[1]["renewed", "few moves"]
    paid = renewed["layer_ms"]["with"] - at_once["layer_ms"]["with"]
    moves_ms = 1000 * renewed["moves_per_layer"]
    assert 0 < moves_ms / 4 < paid < moves_ms + 1  # the device that receives most decides


def test_devices_with_more_slots_than_experts_have_no_such_plan():
    report = compare_policies(skewed(0, 20), 4, 28, "last", ("home",), ("even",), hardware=HARDWARE)
    assert report["engines"] is None


def test_an_array_has_no_command_that_exports_it():
    assert plans(skewed(0, 20))[0]["export"] is None


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="renew_every is 0, expected 1 or more"):
        plans(skewed(0, 20), renew_every=0)
