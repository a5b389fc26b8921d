"""All benchmarks that two CPU cores can show, in one folder that can be sent and compared.

    make bench
    python -m benchmarks.bench --out docs/results/my-machine-2026-11-27

Each step is a command with a timeout; if it fails, that is recorded and the next one runs. The folder holds what every
step printed, its JSON document, and a README.md with a table of all steps, versions and commands. Predictor and model
are made first where they do not exist. If a step fails, the exit code is 1.
"""

import sys
from pathlib import Path

from benchmarks.support.results import BENCH
from benchmarks.support.steps import Step, folder_from_command_line

PREDICTOR, TRACE = Path("outputs/predictor"), Path("outputs/traces/switch-mini-64")
LARGE = Path("outputs/switch-base-64")
GENERATING = "[lru,lfu,cosine,ours_batch,ours_new,ours,oracle]"
"""Arms of the benchmark of a memory budget while text is generated."""
DRAWN = Path("outputs/bench")
"""Where steps draw their pictures."""


def python(module: str, *words: object) -> list[str]:
    """A module as a command."""
    return [sys.executable, "-m", module, *map(str, words)]


def preparation() -> list[Step]:
    """What the steps need and is not there yet: trace, predictor, and a model of switch-base's sizes."""
    steps = []
    if not (PREDICTOR / "config.json").exists():
        train = [sys.executable, "train.py", "--predictor", str(PREDICTOR)]
        steps.append(Step("predictor", train, 1200, pictures=(PREDICTOR / "ladder.png",)))
    if not (LARGE / "config.json").exists():
        made = "--out", LARGE, "--experts", 64, "--blocks", 4, "--capacity", 16
        steps.append(Step("model", python("benchmarks.support.make_switch", *made), 600))
    return steps


def measurements() -> list[Step]:
    """The benchmarks."""
    forecasts = "--predictor", PREDICTOR
    simulated = "--devices", 8, "--redundant", 16, "--out", DRAWN / "simulate"
    generation = "--mode", "generate", "--turns", 2, "--per_phase", 3
    return [
        Step("forecasts", python("predictor.show", PREDICTOR), 60),
        Step(
            "main-job",
            python("runtime.infer", *forecasts, "--out", DRAWN / "infer"),
            300,
            pictures=(
                DRAWN / "infer/balancedness.png",
                DRAWN / "infer/replicas.png",
                DRAWN / "infer/times.png",
            ),
            files=(DRAWN / "infer/report.json",),
        ),
        Step(
            "simulate",
            python("runtime.simulate", TRACE, *forecasts, *simulated),
            300,
            pictures=(DRAWN / "simulate/balancedness.png",),
        ),
        Step("ablation", python("benchmarks.ablation", *forecasts, "--trace", TRACE), 300),
        Step("paper-speed", python("benchmarks.paper_speed", "--repeats", 7), 900),
        Step("paper-quality", python("benchmarks.paper_quality", *forecasts, "--batches", 40), 600),
        Step("one-device", python("benchmarks.one_device", "--repeats", 3), 600),
        Step("replication", python("benchmarks.expert_parallel", "--steps", 40), 400),
        Step("tiers", python("benchmarks.tiers", *forecasts, "--turns", 3), 900),
        Step("tiers-generate", python("benchmarks.tiers", *forecasts, *generation, "--arms", GENERATING), 900),
        Step("workloads", python("benchmarks.drift"), 200),
        Step("planner", python("benchmarks.planner", "--devices", 8, 32, 64, 128), 600),
    ]


def main() -> None:
    """Command line; in a pipe, the last line of stdout is JSON."""
    folder_from_command_line(BENCH, preparation, measurements)


if __name__ == "__main__":
    main()
