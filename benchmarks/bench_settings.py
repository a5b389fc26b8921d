"""What `make bench` measures, in other settings: layers, memory budgets, recorded loads, and what times of GPUs say.

    make bench-settings
    python -m benchmarks.bench_settings --out docs/results/my-machine-2026-11-27-settings

Writes a folder as `make bench` does, in about half an hour on two cores. Predictor and model are made first where they
do not exist.
"""

from benchmarks.bench import DRAWN, PREDICTOR, preparation, python
from benchmarks.support.results import SETTINGS
from benchmarks.support.simulator_tables import MEASURED
from benchmarks.support.steps import Step, folder_from_command_line

COUNTS, OTHER_COUNTS = (f"tests/runtime/recorded/{name}.npz" for name in ("gptoss20b", "dsv2lite"))
"""Recorded loads in the repository."""
EIGHT = "--emulate", 8, "--redundant", 16
"""One layer over eight devices, computed in turn by one process."""


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
        Step("planner-large", python("benchmarks.planner", "--devices", 72, 96, 144, 256, 320), 900),
        Step("layer-integers", python("benchmarks.layer_integers"), 300, env={"MALLOC_TRIM_THRESHOLD_": "1073741824"}),
        Step("forecast-cost", python("benchmarks.forecast_cost"), 300),
    ]  # fmt: skip


def budgets() -> list[Step]:
    """Switch's experts within other budgets, on two processes and on slow disks."""

    def step(name: str, arms: str, *words: object) -> Step:
        return Step(name, python("benchmarks.tiers", "--predictor", PREDICTOR, "--arms", f"[{arms}]", *words), 1200)

    four, five = "lru,lfu,ours,oracle", "lru,lfu,cosine,ours,oracle"
    return [
        step("tiers-2-processes", f"all_resident,{five}", "--ranks", 2, "--turns", 2),
        step("tiers-half", four, "--budget", 0.5, "--turns", 2),
        step("tiers-tenth", four, "--budget", 0.1, "--turns", 2),
        step("tiers-400-mbps", five, "--mbps", 400, "--turns", 1),
    ]


def simulations() -> list[Step]:
    """Replays of recorded loads, and what times of GPUs say."""

    def step(name: str, *words: object) -> Step:
        return Step(name, python("runtime.simulate", *words), 300)

    like = "--like", "gpt_oss_20b"
    gpus = "--gpu", "h100_sxm,h200_sxm,b200_sxm", *like, "--tokens-per-step", "256,2048,8192"
    larger = "--gpu", "h100_sxm", "--like", "deepseek_v3", "--tokens-per-step", "256,8192"
    home, past = ("--planner", "home", "--split", "quota"), ("--forecast", "last,ema")
    return [
        *(step(f"loads-{name}-{slots}", file, "--redundant", slots)
          for name, file in (("gptoss", COUNTS), ("dsv2lite", OTHER_COUNTS)) for slots in (8, 16)),
        *(step(f"moves-{most}", COUNTS, *home, *past, "--max-moves", most) for most in (1, 4)),
        step("nodes", COUNTS, "--split", "quota", *past, "--devices-per-node", 4),
        step("worth-it-gpus", COUNTS, *gpus, "--out", DRAWN / "gpus"),
        step("worth-it-larger", COUNTS, *larger, "--out", DRAWN / "larger"),
        *(step(f"times-{model}", COUNTS, "--gpu", "h100_sxm", "--like", model, "--tokens-per-step", 2048, *home, *past)
          for model in MEASURED),
        Step("skew-cost", python("benchmarks.skew_cost"), 300),
        Step("replica-rows", python("benchmarks.replica_rows"), 300),
        Step("long-recording", python("benchmarks.long_recording", "--steps", 100_000), 1200),
    ]  # fmt: skip


def measurements() -> list[Step]:
    """The benchmarks."""
    return layers() + budgets() + simulations()


def main() -> None:
    """Command line; in a pipe, the last line of stdout is JSON."""
    folder_from_command_line(SETTINGS, preparation, measurements)


if __name__ == "__main__":
    main()
