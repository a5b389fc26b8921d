"""The benchmark tells a thread that keeps the interpreter from one that leaves it alone."""

import time

import benchmarks.forecast_interference
from benchmarks.forecast_interference import Beside, rounds


def test_a_thread_that_keeps_the_interpreter_is_found(monkeypatch):
    monkeypatch.setattr(benchmarks.forecast_interference, "OPERATORS", 2000)
    keeps = rounds(lambda: sum(range(2_000_000)), 3)  # many times as long as a window
    leaves = rounds(lambda: time.sleep(0.01), 3)
    assert keeps["ratio"][1] > 2 * leaves["ratio"][1]
    assert keeps["delay_ms"] > 0
    assert keeps["forecasts"] > 0


def test_a_thread_calls_only_inside_the_block():
    calls = []

    def call() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.01)

    beside = Beside(call)
    time.sleep(0.03)
    assert calls == []
    for _ in range(2):
        before = len(calls)
        with beside.running():
            began = time.perf_counter()
            time.sleep(0.05)
            ended = time.perf_counter()
        made = calls[before:]
        assert len(made) >= 2, "the first call has begun when the block begins"
        assert made[0] <= began
        assert made[-1] <= ended
        assert 0 < beside.done <= len(made)
        time.sleep(0.03)
        assert len(calls) == before + len(made)
    beside.close()
