"""What takes longer than `make bench`: three seeds, the decoder-only model, a model larger than memory.

    make bench-long
    python -m benchmarks.bench_long --out docs/results/my-machine-2026-11-27-long

Writes a folder as `make bench` does, in one to two hours: predictors that exist are not trained again. It takes 35 GB
of disk. The regimes of gpt-oss-20b and its decoding on many devices are measured where its recording was converted to
a trace, see configs/gpt_oss_recording.yaml.
"""

import sys
from pathlib import Path

from benchmarks.bench import DRAWN, PREDICTOR, python
from benchmarks.support.long_tables import SEEDS
from benchmarks.support.results import LONG
from benchmarks.support.steps import Step, folder_from_command_line

FAMILY_MODEL, FAMILY_CONFIG = "qwen3-mini-64", "configs/qwen3_mini.yaml"
FAMILY, FAMILY_TRACE = Path("outputs/qwen3-mini-64/predictor"), Path("outputs/traces/qwen3-mini-64")
RECORDED, RECORDED_TRACE = Path("outputs/gpt-oss/predictor"), Path("outputs/traces/gpt-oss")
WIDE, VAST = Path("outputs/qwen3-wide-64"), Path("outputs/switch-base-128")
GENERATING = "[lru,lfu,cosine,ours_batch,ours,oracle]"
COUNTS = "tests/runtime/recorded/gptoss20b.npz"
"""Recorded loads in the repository, for the verdict on a GPU."""


def predictors() -> dict[str, list[Path]]:
    """Predictor folders of each bundled model, one for each seed."""

    def folders(model: str, first: Path) -> list[Path]:
        return [first, *(Path(f"outputs/seeds/{model}-{seed}") for seed in SEEDS[1:])]

    return {"switch": folders("switch-mini-64", PREDICTOR), "family": folders(FAMILY_MODEL, FAMILY)}


def preparation() -> list[Step]:
    """What the measurements need and is not there yet: predictors, and two models with random weights."""
    steps, options = list[Step](), {"switch": [], "family": ["--config", FAMILY_CONFIG]}
    for model, folders in predictors().items():
        for seed, folder in zip(SEEDS, folders, strict=True):
            if not (folder / "config.json").exists():
                words = [*options[model], "--seed_everything", str(seed), "--predictor", str(folder)]
                steps.append(Step(f"train-{model}-{seed}", [sys.executable, "train.py", *words], 2400))
    if RECORDED_TRACE.exists() and not (RECORDED / "config.json").exists():
        train = [sys.executable, "train.py", "--config", "configs/gpt_oss_recording.yaml"]
        steps.append(Step("train-recorded", train, 2400))
    made = {WIDE: python("benchmarks.support.make_qwen3", "--out", WIDE),
            VAST: python("benchmarks.support.make_switch", "--out", VAST, "--experts", 128)}  # fmt: skip
    return steps + [
        Step(f"model-{folder.name}", command, 1800)
        for folder, command in made.items() if not (folder / "config.json").exists()
    ]  # fmt: skip


def measurements() -> list[Step]:
    """The benchmarks."""
    family = "--predictor", FAMILY
    shown = {model: [f"{seed}={folder}" for seed, folder in zip(SEEDS, folders, strict=True)]
             for model, folders in predictors().items()}  # fmt: skip
    simulated = FAMILY_TRACE, *family, "--devices", 8, "--redundant", 16, "--out", DRAWN / "simulate-family"
    on_gpu = "--gpu", "b200_sxm", "--like", "gpt_oss_20b", "--tokens-per-step", 8192
    within = "--recorded", FAMILY_MODEL, "--model", WIDE, "--mode", "generate", "--sequences", 2, "--arms", GENERATING
    steps = [
        Step("seeds", python("predictor.show", *shown["switch"]), 60),
        Step("seeds-family", python("predictor.show", *shown["family"]), 60),
        Step("main-job-family", python("runtime.infer", "--model", FAMILY_MODEL, *family), 600),
        Step("ablation-family", python("benchmarks.ablation", *family, "--trace", FAMILY_TRACE), 600),
        Step("simulate-family", python("runtime.simulate", *simulated), 600),
        Step("worth-it", python("runtime.simulate", COUNTS, *on_gpu), 300),
        Step("one-device-family", python("benchmarks.one_device_family", "--top-k", 4, "--repeats", 3), 900),
        Step("tiers-family", python("benchmarks.tiers", *family, *within, "--turns", 2, "--per_phase", 3), 1800),
        Step("beyond-memory", python("benchmarks.beyond_memory", "--model", VAST), 1800),
    ]
    if RECORDED_TRACE.exists():
        steps += [
            Step("regimes", python("benchmarks.regimes", RECORDED_TRACE, RECORDED, "--steps", 60), 1800),
            Step("decode-recorded", python("benchmarks.decode", "--trace", RECORDED_TRACE, "--tokens", 4), 600),
        ]
    return steps


def main() -> None:
    """Command line; in a pipe, the last line of stdout is JSON."""
    folder_from_command_line(LONG, preparation, measurements)


if __name__ == "__main__":
    main()
