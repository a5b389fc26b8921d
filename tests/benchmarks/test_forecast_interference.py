"""Ratios are taken within each round, and a thread beside the launching one calls only inside its block."""

from itertools import cycle
from queue import Queue

import pytest

import benchmarks.forecast_interference
from benchmarks.forecast_interference import Beside, rounds


def test_the_control_is_taken_off_the_delay_of_a_forecast(monkeypatch):
    made: Queue[None] = Queue()
    seconds = cycle((2.0, 2.2, 3.0))  # alone, beside a busy core, beside a forecast

    def window(*_: object) -> float:
        taken = next(seconds)
        if taken == 3.0:
            while not made.empty():
                made.get()
            for _ in range(3):  # of the calls that end from now on, at least one lies within the window
                made.get()
        return taken

    monkeypatch.setattr(benchmarks.forecast_interference, "window", window)
    found = rounds(lambda: made.put(None), 3)
    assert found["control"] == [1.1, 1.1, 1.1]
    assert found["ratio"] == [1.5, 1.5, 1.5]
    assert found["operator_us"] == 100.0
    assert found["delay_ms"] * found["forecasts"] == pytest.approx(3 * 800, rel=0.1)


def test_a_thread_calls_only_inside_the_block():
    inside, began, ended, ends = False, list[bool](), list[bool](), Queue[None]()

    def call() -> None:
        began.append(inside)
        ends.put(None)
        ended.append(inside)

    beside = Beside(call)
    for _ in range(3):
        before, inside = len(began), True
        with beside.running():
            assert len(began) > before, "the first call has begun when the block begins"
            while not ends.empty():
                ends.get()
            for _ in range(3):
                ends.get()
        assert 0 < beside.done <= len(began) - before
        assert len(ended) == len(began), "the last call is waited for"
        inside = False
    beside.close()
    assert all(began)
