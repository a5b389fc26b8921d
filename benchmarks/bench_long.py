"""What takes longer than `make bench`: seeds, other models and networks, layers, budgets, a model larger than memory.

    make bench-long
    python -m benchmarks.bench_long --out docs/results/my-machine-2026-11-27-long

Writes a folder as `make bench` does, in two to four hours: predictors that exist are not trained again. It takes 40 GB
of disk. The regimes of gpt-oss-20b are measured where its recording was converted to a trace, see
configs/gpt_oss_recording.yaml.
"""

import sys
from datetime import date
from pathlib import Path

from benchmarks.bench import DRAWN, LARGE, PREDICTOR, make_large, python
from benchmarks.support.long_tables import SEEDS
from benchmarks.support.results import LONG
from benchmarks.support.steps import Step, processor, results_folder, run_and_say
from data.cli import from_command_line, user_errors

FAMILY_MODEL, FAMILY_CONFIG = "qwen3-mini-64", "configs/qwen3_mini.yaml"
FAMILY, FAMILY_TRACE = Path("outputs/qwen3-mini-64/predictor"), Path("outputs/traces/qwen3-mini-64")
RECORDED, RECORDED_TRACE = Path("outputs/gpt-oss/predictor"), Path("outputs/traces/gpt-oss")
WIDE, VAST = Path("outputs/qwen3-wide-64"), Path("outputs/switch-base-128")
GENERATING = "[lru,lfu,cosine,ours_batch,ours,oracle]"
NETWORKS = {name: Path(f"outputs/{name}/predictor") for name in ("paper", "sida")}
"""Predictors with the networks of two papers, by the names of their configs."""
COUNTS, OTHER_COUNTS = (f"tests/runtime/recorded/{name}.npz" for name in ("gptoss20b", "dsv2lite"))
"""Recorded loads in the repository."""
EIGHT = "--emulate", 8, "--redundant", 16
"""One layer over eight devices, computed in turn by one process."""


def predictors() -> dict[str, list[Path]]:
    """Predictor folders of each bundled model, one for each seed."""

    def folders(model: str, first: Path) -> list[Path]:
        return [first, *(Path(f"outputs/seeds/{model}-{seed}") for seed in SEEDS[1:])]

    return {"switch": folders("switch-mini-64", PREDICTOR), "family": folders(FAMILY_MODEL, FAMILY)}


def preparation() -> list[Step]:
    """What the measurements need and is not there yet: predictors, and models with random weights."""
    steps, options = list[Step](), {"switch": [], "family": ["--config", FAMILY_CONFIG]}
    for model, folders in predictors().items():
        for seed, folder in zip(SEEDS, folders, strict=True):
            if not (folder / "config.json").exists():
                words = [*options[model], "--seed_everything", str(seed), "--predictor", str(folder)]
                steps.append(Step(f"train-{model}-{seed}", [sys.executable, "train.py", *words], 2400))
    for name, folder in NETWORKS.items():
        if not (folder / "config.json").exists():
            steps.append(Step(f"train-{name}", [sys.executable, "train.py", "--config", f"configs/{name}.yaml"], 5400))
    if RECORDED_TRACE.exists() and not (RECORDED / "config.json").exists():
        train = [sys.executable, "train.py", "--config", "configs/gpt_oss_recording.yaml"]
        steps.append(Step("train-recorded", train, 2400))
    made = {LARGE: make_large(),
            WIDE: python("benchmarks.support.make_qwen3", "--out", WIDE),
            VAST: python("benchmarks.support.make_switch", "--out", VAST, "--experts", 128)}  # fmt: skip
    return steps + [
        Step(f"model-{folder.name}", command, 1800)
        for folder, command in made.items() if not (folder / "config.json").exists()
    ]  # fmt: skip


def models() -> list[Step]:
    """Seeds, the decoder-only model, other networks, recordings, and a model larger than memory."""
    family = "--predictor", FAMILY
    shown = {model: [f"{seed}={folder}" for seed, folder in zip(SEEDS, folders, strict=True)]
             for model, folders in predictors().items()}  # fmt: skip
    networks = [f"{name}={folder}" for name, folder in {"ours": PREDICTOR, **NETWORKS}.items()]
    simulated = FAMILY_TRACE, *family, "--devices", 8, "--redundant", 16, "--out", DRAWN / "simulate-family"
    within = "--recorded", FAMILY_MODEL, "--model", WIDE, "--mode", "generate", "--sequences", 2, "--arms", GENERATING
    steps = [
        Step("seeds", python("predictor.show", *shown["switch"]), 60),
        Step("seeds-family", python("predictor.show", *shown["family"]), 60),
        Step("networks", python("predictor.show", *networks), 60),
        Step("forecast-cost", python("benchmarks.forecast_cost"), 300),
        Step("main-job-family", python("runtime.infer", "--model", FAMILY_MODEL, *family), 600),
        Step("ablation-family", python("benchmarks.ablation", *family, "--trace", FAMILY_TRACE), 600),
        Step("simulate-family", python("runtime.simulate", *simulated), 600),
        Step("one-device-family", python("benchmarks.one_device_family", "--top-k", 4, "--repeats", 3), 900),
        Step("tiers-family", python("benchmarks.tiers", *family, *within, "--turns", 2, "--per_phase", 3), 1800),
        Step("beyond-memory", python("benchmarks.beyond_memory", "--model", VAST), 1800),
    ]
    if RECORDED_TRACE.exists():
        steps.append(Step("regimes", python("benchmarks.regimes", RECORDED_TRACE, RECORDED, "--steps", 60), 1800))
    return steps


def layers() -> list[Step]:
    """One layer over several devices."""

    def step(name: str, *words: object) -> Step:
        return Step(name, python("benchmarks.expert_parallel", *words), 600)

    auto = "--expert-overhead-tokens", "auto"
    top_8 = "--top-k", 8, "--experts", 64, "--redundant", 16
    return [
        step("layer-64-experts", "--experts", 64),
        step("layer-recorded", "--loads", COUNTS),
        step("layer-8-devices", *EIGHT, "--steps", 24),
        step("layer-8-devices-64-experts", *EIGHT, "--experts", 64, "--steps", 24),
        *(step(f"price-{tokens}", *EIGHT, "--experts", 64, "--steps", 24, "--tokens", tokens, *auto)
          for tokens in (512, 4096)),
        step("layer-top-8", *top_8, "--tokens", 1024, "--steps", 16),
        step("layer-top-8-8-devices", *top_8, "--tokens", 1024, "--steps", 16, "--emulate", 8),
        *(step(f"decoding-{tokens}", *top_8, "--emulate", 8, "--tokens", tokens, "--steps", 44, *auto)
          for tokens in (16, 128)),
        Step("decode", python("benchmarks.decode"), 900),
    ]  # fmt: skip


def budgets() -> list[Step]:
    """Switch's experts within other budgets, on two processes and on slow disks."""

    def step(name: str, arms: str, *words: object) -> Step:
        return Step(name, python("benchmarks.tiers", "--predictor", PREDICTOR, "--arms", f"[{arms}]", *words), 1200)

    four, five = "lru,lfu,ours,oracle", "lru,lfu,cosine,ours,oracle"
    return [
        step("tiers-2-processes", f"all_resident,{five}", "--ranks", 2, "--turns", 2),
        step("tiers-all", "all_resident,ours", "--budget", 1.0, "--plain", "true", "--turns", 2),
        step("tiers-half", four, "--budget", 0.5, "--turns", 2),
        step("tiers-tenth", four, "--budget", 0.1, "--turns", 2),
        step("tiers-1-sequence", four, "--mode", "encoder", "--sequences", 1, "--per_phase", 8, "--turns", 2),
        step("tiers-64-sequences", four, "--mode", "encoder", "--sequences", 64, "--turns", 2),
        step("tiers-1100-mbps", five, "--mbps", 1100, "--turns", 2),
        step("tiers-400-mbps", five, "--mbps", 400, "--turns", 1),
    ]


def simulations() -> list[Step]:
    """Replays of recorded loads, and what times of GPUs say."""

    def step(name: str, *words: object, seconds: float = 300) -> Step:
        return Step(name, python("runtime.simulate", *words), seconds)

    like = "--like", "gpt_oss_20b"
    gpus = "--gpu", "h100_sxm,h200_sxm,b200_sxm", *like, "--tokens-per-step", "256,2048,8192"
    larger = "--gpu", "h100_sxm", "--like", "deepseek_v3", "--tokens-per-step", "256,8192"
    home, past = ("--planner", "home", "--split", "quota"), ("--forecast", "last,ema")
    return [
        *(step(f"loads-{name}-{slots}", file, "--redundant", slots)
          for name, file in (("gptoss", COUNTS), ("dsv2lite", OTHER_COUNTS)) for slots in (8, 16)),
        *(step(f"moves-{most}", COUNTS, *home, *past, "--max-moves", most) for most in (1, 4)),
        step("nodes", COUNTS, "--split", "quota", *past, "--devices-per-node", 4),
        step("worth-it", COUNTS, "--gpu", "b200_sxm", *like, "--tokens-per-step", 8192),
        step("worth-it-gpus", COUNTS, *gpus, "--out", DRAWN / "gpus"),
        step("worth-it-larger", COUNTS, *larger, "--out", DRAWN / "larger"),
        Step("skew-cost", python("benchmarks.skew_cost"), 300),
        Step("replica-rows", python("benchmarks.replica_rows"), 300),
        Step("long-recording", python("benchmarks.long_recording", "--steps", 100_000), 1200),
    ]  # fmt: skip


def measurements() -> list[Step]:
    """The benchmarks."""
    return models() + layers() + budgets() + simulations()


def bench_long(out: Path | None = None) -> int:
    """Runs every long benchmark and writes one folder with all results.

    Args:
        out: Folder of the results; by default docs/results/, the processor's name, the date and "long".

    Returns:
        The number of steps that failed.

    Raises:
        ValueError: If the folder exists already.
    """
    name = processor()
    folder = results_folder(name)
    return run_and_say(
        preparation() + measurements(), out or folder.with_name(f"{folder.name}-long"), f"{name}, {date.today()}", LONG
    )


def main() -> None:
    """Command line; the last line of stdout is one JSON document."""
    with user_errors():
        failed = from_command_line(bench_long)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
