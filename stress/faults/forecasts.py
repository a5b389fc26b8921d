"""Forecasters that fail, ranks of other versions, and a clock that jumps: outputs stay, or the run is refused."""

import copy
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import runtime.engine.controller
import runtime.engine.engine
from data.models.model import LoadedModel
from predictor.forecast import LoadForecast, forecast_from_load
from runtime.engine.engine import Engine
from stress.faults.commands import command, environment
from stress.faults.fault import Fault
from stress.faults.lost_ranks import write_run
from tests.conftest import small_switch
from tests.helpers.batches import batches, largest_difference
from tests.helpers.forecasters import Broken, Noise
from tests.helpers.predictors import untrained
from tests.helpers.processes import on_ranks

MOST_DIFFERENCE = 1e-5


class Hangs:
    """Never returns."""

    name = "hangs"

    def forecast(self, upcoming: object, history: object) -> LoadForecast:
        """Waits for ever."""
        threading.Event().wait()
        raise AssertionError


class Huge(Noise):  # type: ignore[misc]
    """Forecasts 1e300 tokens for each expert."""

    def forecast(self, upcoming: object, history: object) -> LoadForecast:
        """A finite forecast that no batch can have."""
        return forecast_from_load(np.full(self.shape, 1e300), made_at=0, source=self.name)


FORECASTERS: dict[str, Callable[[], Any]] = {
    "hangs": lambda: Hangs(), "returns NaN": lambda: Broken("nan"), "raises": lambda: Broken("raises"),
    "returns another shape": lambda: Broken("other layout"), "calls sys.exit": lambda: Broken("exits"),
    "forecasts 1e300 tokens": lambda: Huge(LoadedModel.of(small_switch()).layout),
}  # fmt: skip


def with_forecaster(rank: int, how: str) -> tuple[float, int, int]:
    """Largest difference from the plain model, late preparations and fallbacks."""
    runtime.engine.controller.PATIENCE_S = 1.0
    switch = small_switch()
    plain = copy.deepcopy(switch)
    with Engine(switch, FORECASTERS[how](), None, 8, timeout_s=20.0) as engine:
        worst = largest_difference(engine, plain, batches(6))
        return worst, engine.controller.late, sum(engine.controller.fallbacks.values())


def forecaster(how: str, folder: Path) -> str:
    """Runs 6 batches on two ranks with a forecaster that fails on rank 0."""
    results = on_ranks(2, with_forecaster, how, timeout_s=60.0)
    for result in results:
        assert isinstance(result, tuple), result
        assert result[0] <= MOST_DIFFERENCE, f"outputs differ by {result[0]}"
    worst, late, replaced = results[0]
    assert late + replaced > 0, "nothing was counted"
    return f"6 batches, difference {worst:.0e}; {replaced} forecasts replaced, {late} plans late"


def with_version(rank: int, what: str, folder: Path) -> None:
    """Opens an engine; rank 1 has another version."""
    if rank == 1 and what == "torch":
        torch.__version__ = "2.9.0"  # type: ignore[assignment]
    if rank == 1 and what == "transformers":
        transformers.__version__ = "5.18.0"
    if rank == 1 and what == "switchcast":
        setattr(runtime.engine.engine, "code_digest", lambda: "0123456789abcdef")  # noqa: B010
    predictor = folder / ("other" if rank == 1 and what == "predictor" else "predictor")
    with Engine(str(folder / "model"), predictor, None, 4, timeout_s=20.0):
        pass


def version(what: str, folder: Path) -> str:
    """Starts two ranks of which one has another version."""
    write_run(folder)
    if what == "predictor":
        untrained(folder / "model", folder / "other", seed=1)
    results = on_ranks(2, with_version, what, folder, timeout_s=60.0)
    for result in results:
        assert str(result).startswith(f"ValueError: {what} is "), result
        assert str(result).endswith("on rank 1"), result
    return str(results[0]).removeprefix("ValueError: ")


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
/* From the moment a file exists, the clock of the day is a day ahead on rank 0, and a day behind on rank 1. */
static long jump(void) {
    const char *rank = getenv("RANK"), *file = getenv("CLOCK_JUMPS");
    return !rank || !file || access(file, F_OK) ? 0 : *rank == '0' ? 86400 : -86400;
}
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int r = real(id, t);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) t->tv_sec += jump();
    return r;
}
int gettimeofday(struct timeval *restrict t, void *restrict z) {
    struct timespec s; clock_gettime(CLOCK_REALTIME, &s);
    t->tv_sec = s.tv_sec; t->tv_usec = s.tv_nsec / 1000; return 0;
}
time_t time(time_t *t) {
    struct timespec s; clock_gettime(CLOCK_REALTIME, &s);
    if (t) *t = s.tv_sec; return s.tv_sec;
}
"""


def clock(folder: Path) -> str:
    """Runs two ranks whose clocks jump apart by two days."""
    write_run(folder)
    (folder / "clock.c").write_text(CLOCK)
    compiler = shutil.which("cc")
    if compiler is None:
        raise NotImplementedError("a false clock needs a C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "clock.so", "clock.c", "-ldl"], cwd=folder, check=True)
    words = ["--standalone", "--nproc-per-node", 2, "-m", "runtime.infer", "--model", folder / "model", "--predictor",
             folder / "predictor", "--text", folder / "words.txt", "--redundant=4", "--batches=150", "--timeout=10",
             "--batching.batches=150", "--batching.smallest=3", "--batching.largest=3", "--metrics-file",
             folder / "metrics.jsonl", "--out", folder / "out"]  # fmt: skip
    process = subprocess.Popen(
        command("torch.distributed.run", *words), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=environment(LD_PRELOAD=str(folder / "clock.so"), CLOCK_JUMPS=str(folder / "now")), text=True,
    )  # fmt: skip
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    (folder / "now").touch()
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said[-1500:]
    report = json.loads((folder / "out" / "report.json").read_text())
    times = [json.loads(line)["time"] for line in metrics.read_text().splitlines()]
    jumped = max(later - earlier for earlier, later in pairwise(times))
    assert jumped > 80_000, "the clock did not jump during the run"
    assert report["max_logit_difference"] <= MOST_DIFFERENCE
    spans = {name: value for name, value in report["ms"].items() if not 0 <= value < 10_000}
    assert not spans, f"times that no batch took: {spans}"
    return f"{report['batches']} batches, difference {report['max_logit_difference']:.0e}, no rank was taken for lost"


FAULTS = [
    *(
        Fault(
            f"forecaster {how}", f"the forecaster of rank 0 {how}, 2 ranks",
            "outputs are the plain model's; replaced and late forecasts are counted", partial(forecaster, how),
        )
        for how in FORECASTERS
    ),
    *(
        Fault(
            f"another {what}", f"rank 1 runs another version of {what}", "all ranks refuse to start, and name it",
            partial(version, what),
        )
        for what in ("switchcast", "predictor", "torch", "transformers")
    ),
    Fault(
        "clock jumps", "in the middle of a run the clocks of two ranks jump, a day ahead and a day back",
        "the run goes on; no rank is taken for lost; times are right", clock,
    ),
]  # fmt: skip
