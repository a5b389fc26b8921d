"""The controller alone: what it forecasts from, when plans become active, what takes a failed forecast's place."""

import threading

import numpy as np
import pytest

from data.traces.trace import pad_tokens
from predictor.baselines.history import LastBatch
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.balancing.planner import HomePlanner
from runtime.distributed.ranks import Ranks
from runtime.engine.controller import HISTORY, Controller
from tests.helpers.forecasters import Broken

LAYERS, EXPERTS, DEVICES, REDUNDANT = 2, 8, 4, 4
HOME = ReplicationPlan.at_home(contiguous_homes(LAYERS, EXPERTS), DEVICES, REDUNDANT)
SKEWED = np.tile(np.array([100, 1, 1, 1, 1, 1, 1, 1]), (LAYERS, 1))


class PaperTransfer:
    """Makes plans active without any weights."""

    def __init__(self):
        self.plan, self.target, self.arrived = HOME, HOME, True

    def start(self, target, forecast=None):
        self.target = target
        return self.plan.moves_to(target)

    def commit(self):
        self.plan = self.target
        return self.plan

    def nbytes(self, moves):
        return 10 * len(moves)


def controller(forecaster, planner=None):
    return Controller(forecaster, planner or HomePlanner(DEVICES, REDUNDANT), PaperTransfer(), Ranks())


def test_a_plan_becomes_active_at_commit_and_copies_the_hot_expert():
    made = controller(LastBatch())
    made.observe(SKEWED)
    made.prepare(None)
    assert made.transfer.plan is HOME
    preparation = made.commit(wait=True)
    assert (made.transfer.plan.phy2log == 0).sum(-1).min() > 1
    assert preparation.moves == sum(preparation.layer_moves) == len(HOME.moves_to(made.transfer.plan))
    assert preparation.nbytes == 10 * preparation.moves
    assert made.commit() is None


def test_only_the_last_loads_are_kept():
    made = controller(LastBatch())
    for step in range(HISTORY + 3):
        made.observe(SKEWED + step)
    assert len(made.history) == HISTORY
    assert (made.history[-1] == SKEWED + HISTORY + 2).all()


class Gate(LastBatch):
    """Forecasts once it is let through."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "open", threading.Event())

    def forecast(self, upcoming, history):
        self.open.wait()
        return super().forecast(upcoming, history)


def test_a_late_plan_waits_for_the_next_boundary_and_holds_nothing_up():
    gate = Gate()
    made = controller(gate)
    made.observe(SKEWED)
    made.prepare(None)
    assert made.commit() is None
    assert (made.late, made.transfer.plan) == (1, HOME)
    made.prepare(None)  # ignored: the first is still running
    gate.open.set()
    assert made.commit(wait=True).moves > 0
    assert made.commit(wait=True) is None


def test_weights_that_have_not_arrived_keep_the_old_plan():
    made = controller(LastBatch())
    made.observe(SKEWED)
    made.prepare(None)
    made.commit(wait=True)
    made.prepare(None)
    made.transfer.arrived = False
    while not made._future.done():
        pass
    assert made.commit() is None
    assert made.late == 1


class Learner(LastBatch):
    """Counts what it was given to learn from before each forecast."""

    def __init__(self, broken=False):
        super().__init__()
        object.__setattr__(self, "calls", [])
        object.__setattr__(self, "broken", broken)

    def observe(self, upcoming, load, sequences=None):
        if self.broken:
            raise RuntimeError("it cannot learn")
        self.calls.append((upcoming, int(load[0, 0])))

    def forecast(self, upcoming, history):
        self.calls.append("forecast")
        return super().forecast(upcoming, history)


def test_a_forecaster_learns_from_each_batch_once_before_the_next_forecast():
    learner = Learner()
    made, tokens = controller(learner), pad_tokens([np.array([3, 4])], 0)
    made.observe(SKEWED, tokens)
    made.observe(SKEWED + 1)
    for _ in range(2):
        made.prepare(None)
        made.commit(wait=True)
    assert learner.calls == [(tokens, 100), (None, 101), "forecast", "forecast"]


def test_a_forecaster_that_cannot_learn_still_forecasts():
    made = controller(Learner(broken=True))
    made.observe(SKEWED)
    made.prepare(None)
    assert made.commit(wait=True).forecast.source == "last"
    assert dict(made.fallbacks) == {"RuntimeError: it cannot learn": 1}


@pytest.mark.parametrize("how", ["raises", "exits", "nan", "other layout"])
def test_past_loads_take_a_failed_forecasts_place(how, caplog):
    made = controller(Broken(how))
    made.prepare(None)
    assert made.commit(wait=True).forecast is None  # no past either: the placement stays
    assert made.transfer.plan.phy2log.tolist() == HOME.phy2log.tolist()
    made.observe(SKEWED)
    made.prepare(None)
    assert made.commit(wait=True).forecast.source == "ema"
    assert sum(made.fallbacks.values()) == 2
    assert len([record for record in caplog.records if "past loads take its place" in record.message]) == 1


def test_a_planner_that_raises_keeps_the_placement(caplog):
    class Raising:
        def plan(self, forecast, current, recent):
            raise RuntimeError("no plan today")

    made = controller(LastBatch(), Raising())
    made.observe(SKEWED)
    made.prepare(None)
    assert made.commit(wait=True).moves == 0
    assert made.fallbacks == {"RuntimeError: no plan today": 1}
    assert "planner failed (RuntimeError: no plan today); the placement stays as it is" in caplog.text


def test_a_forecaster_gets_copies_of_the_tokens():
    class Scribbler(LastBatch):
        def forecast(self, upcoming, history):
            upcoming.input_ids.fill_(7)
            history.fill(0)
            return super().forecast(upcoming, np.stack([SKEWED]))

    made, tokens = controller(Scribbler()), pad_tokens([np.array([1, 2, 3])], pad=0)
    made.observe(SKEWED)
    made.prepare(tokens)
    made.commit(wait=True)
    assert tokens.input_ids.tolist() == [[1, 2, 3]]
    assert (made.history[-1] == SKEWED).all()


def test_after_closing_no_copies_are_started():
    asked, go_on = threading.Event(), threading.Event()

    class Slow(LastBatch):
        def forecast(self, upcoming, history):
            asked.set()
            go_on.wait(10)
            return super().forecast(upcoming, history)

    made = controller(Slow())
    made.observe(SKEWED)
    made.prepare(None)
    future = made._future
    assert asked.wait(10)
    made.close()
    go_on.set()
    assert "the engine was closed before the weights were copied" in str(future.exception(10))
    assert made.transfer.target is HOME


def test_moving_homes_are_refused():
    moving = HomePlanner(DEVICES, REDUNDANT, moving_homes=True)
    with pytest.raises(ValueError, match="moving_homes=True, but this engine copies weights from homes that never"):
        controller(LastBatch(), moving)


def test_a_plan_with_other_homes_leaves_the_placement_as_it_is():
    class Moves:
        def plan(self, forecast, current, recent):
            homes = current.homes[:, [1, 0, *range(2, EXPERTS)]]
            phy2log = current.phy2log.copy()
            np.put_along_axis(phy2log, homes, np.arange(EXPERTS)[None], axis=-1)
            return ReplicationPlan(phy2log, DEVICES, homes)

    made = controller(LastBatch(), Moves())
    made.observe(SKEWED)
    made.prepare(None)
    assert made.commit(wait=True).moves == 0
    assert [reason for reason in made.fallbacks if "moves homes" in reason]
