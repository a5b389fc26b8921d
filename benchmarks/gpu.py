"""Everything that only a GPU can show, in one folder that can be sent: tests, exactness, benchmarks, sanitizers.

    make gpu
    python -m benchmarks.gpu --predictor outputs/predictor --out docs/results/h100-2026-11-26
    python -m benchmarks.gpu --only paper,one-device                      # a part, where a GPU is lent for minutes

Each step is a command with a timeout; if it fails, that is recorded and the next one runs. The folder holds what every
step printed, its JSON document, and a README.md with a table of all steps, versions and commands. Logs hold paths of
files: read them before you send them. Without a GPU nothing runs (exit code 2); if a step fails, the exit code is 1.
"""

import shutil
import sys
from pathlib import Path

import torch

from benchmarks.support.results import GPU
from benchmarks.support.steps import Step, results_folder, run_and_say
from data.cli import from_command_line, user_errors

INFER, EXPERTS, SLOTS = "runtime.infer", 64, 2
"""The command that is checked; experts of the replication benchmark, and replica slots of each of its devices."""
DEFAULT = Path("outputs/predictor")
TESTED = ("tests/runtime/engine", "tests/runtime/offload")
"""Folders with tests that need a GPU; all tests take a minute to collect."""
SYNCS = "called a synchronizing CUDA operation"
WATCHED = (
    "import sys, torch; torch.cuda.set_sync_debug_mode('warn'); from runtime.infer.__main__ import main; "
    "sys.argv[0] = 'infer'; main()"
)
"""Runs the command with a warning at every operation for which the host waits for the GPU."""


def powers(gpus: int) -> list[int]:
    """1, 2, 4, ... and all GPUs."""
    return sorted({*(2**power for power in range(gpus.bit_length()) if 2**power <= gpus), gpus})


def largest_power(gpus: int) -> int:
    """The largest power of two up to the number of GPUs, because the bundled model's 64 experts must divide."""
    return int(2 ** (gpus.bit_length() - 1))


def torchrun(ranks: int, *words: str) -> list[str]:
    """A module started once for each of several GPUs."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", *words]


def infer(out: Path, predictor: Path, **options: object) -> list[str]:
    """The words of the command, after its module's name."""
    given = {"predictor": predictor, "out": out, **options}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def exactness(gpus: int, predictor: Path, aside: Path) -> list[Step]:
    """Outputs compared with the plain model's: one device, eight emulated ones, and one process for each GPU."""
    steps, ranks = [], largest_power(gpus)
    for dtype in ("float32", "bfloat16"):
        alone = infer(aside, predictor, device="cuda", dtype=dtype, devices=1, redundant=0, details="true")
        eight = infer(aside, predictor, device="cuda", dtype=dtype, devices=8, redundant=16, details="true")
        steps.append(Step(f"exactness-{dtype}", [sys.executable, "-m", INFER, *alone], 900))
        steps.append(Step(f"exactness-{dtype}-8-emulated", [sys.executable, "-m", INFER, *eight], 900))
        if gpus > 1:
            each = infer(aside, predictor, device="cuda", dtype=dtype, redundant=SLOTS * ranks, details="true")
            steps.append(Step(f"exactness-{dtype}-{ranks}-gpus", torchrun(ranks, INFER, *each), 900))
    return steps


def one_device() -> list[Step]:
    """One layer on one GPU against grouped products: Switch's experts, and gated ones with several a token."""
    gpu = ["--device", "cuda", "--dtype", "bfloat16"]
    switch = [sys.executable, "-m", "benchmarks.one_device", *gpu, "--experts", "64"]
    steps = [Step("one-device", switch, 900)]
    for experts, top_k in ((64, 4), (128, 8)):
        gated = ["--experts", str(experts), "--top-k", str(top_k)]
        words = [sys.executable, "-m", "benchmarks.one_device_family", *gpu, *gated]
        steps.append(Step(f"one-device-top-{top_k}", words, 900))
    return steps


def paper(predictor: Path) -> list[Step]:
    """The paper's experiment: speed, busy share and memory for four numbers of experts, and what answers lose."""
    steps = []
    for dtype, named in (("bfloat16", "-bfloat16"), ("float32", "")):  # float32 is what make bench compares with
        gpu = ["--device", "cuda", "--dtype", dtype]
        speed = ["benchmarks.paper_speed", "--experts", "8", "64", "128", "256", *gpu]
        quality = ["benchmarks.paper_quality", "--predictor", str(predictor), "--batches", "40", *gpu]
        steps.append(Step(f"paper-speed{named}", [sys.executable, "-m", *speed], 900))
        steps.append(Step(f"paper-quality{named}", [sys.executable, "-m", *quality], 900))
    return steps


def replication(gpus: int) -> list[Step]:
    """One MoE layer under skewed loads over 1, 2, 4, ... and all GPUs, in both dtypes."""
    steps = []
    for ranks in powers(gpus):
        experts = EXPERTS if EXPERTS % ranks == 0 else EXPERTS // 4 * ranks
        for dtype in ("bfloat16", "float32"):
            redundant = SLOTS * ranks if ranks > 1 else 0
            words = ["benchmarks.expert_parallel", "--experts", experts, "--redundant", redundant]
            words += ["--tokens", 4096 * ranks, "--steps", 104, "--dtype", dtype]
            steps.append(Step(f"replication-{ranks}-{dtype}", torchrun(ranks, *map(str, words)), 900))
    return steps


def tiers(predictor: Path, aside: Path) -> list[Step]:
    """Experts within a byte budget: the command with half of them on the GPU, and the benchmark of cache policies."""
    model = "outputs/switch-base-64"
    half = infer(aside, predictor, device="cuda", dtype="bfloat16", device_memory="6MiB", host_memory="64MiB",
                 details="true")  # fmt: skip
    made = ["benchmarks.support.make_switch", "--out", model, "--experts", "64", "--blocks", "4", "--capacity", "16"]
    bench = ["benchmarks.tiers", "--model", model, "--predictor", str(predictor)]
    steps = [Step("budget-bfloat16", [sys.executable, "-m", INFER, *half], 900)]
    if not Path(model).exists():
        steps.append(Step("tiers-model", [sys.executable, "-m", *made], 900))
    return [*steps, Step("tiers", [sys.executable, "-m", *bench], 1800)]


def sanitizers(gpus: int, predictor: Path, aside: Path) -> list[Step]:
    """Syncs counted, races between streams, memory faults, and NCCL with one hardware queue."""
    short = infer(aside, predictor, device="cuda", dtype="bfloat16", devices=8, batches=3, check="false")
    run = [sys.executable, "-m", INFER, *short]
    steps = [
        Step("syncs", [sys.executable, "-W", "always", "-c", WATCHED, *short], 600, counted=SYNCS),
        Step("stream-sanitizer", run, 1200, {"TORCH_CUDA_SANITIZER": "1"}, "CSAN detected"),
    ]
    if tool := shutil.which("compute-sanitizer"):
        flags = [tool, "--tool", "memcheck", "--error-exitcode", "99", "--target-processes", "all"]
        steps.append(Step("memcheck", [*flags, *run], 1800, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    if gpus > 1:
        ranks = largest_power(gpus)
        each = infer(aside, predictor, device="cuda", dtype="bfloat16", redundant=SLOTS * ranks, batches=48)
        steps.append(Step("one-queue", torchrun(ranks, INFER, *each), 900, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}))
    return steps


def all_steps(gpus: int, predictor: Path | None, aside: Path) -> list[Step]:
    """All steps for a machine with some GPUs.

    Args:
        gpus: Number of GPUs.
        predictor: The predictor; None trains the default one first.
        aside: Folder for what the commands write.
    """
    trained = predictor or DEFAULT
    train = [Step("predictor", [sys.executable, "train.py", "--predictor", str(DEFAULT)], 1800)]
    tests = Step("tests", [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *TESTED], 1800)
    trace = ["--device", "cuda", "--dtype", "bfloat16", "--batching.batches", "20", "--out", str(aside / "trace")]
    interference = [sys.executable, "-m", "benchmarks.forecast_interference", "--predictor", str(trained)]
    return [
        tests,
        *([] if predictor else train),
        Step("collect-bfloat16", [sys.executable, "-m", "data.collect", *trace], 900),
        *exactness(gpus, trained, aside),
        *paper(trained),
        *one_device(),
        *replication(gpus),
        *tiers(trained, aside),
        Step("forecast-interference", interference, 600),
        *sanitizers(gpus, trained, aside),
    ]


def chosen(steps: list[Step], only: str) -> list[Step]:
    """Steps whose names begin with one of the words of a list, in the list's order.

    Raises:
        ValueError: If no step's name begins with a word.
    """
    found: dict[str, Step] = {}
    for word in only.split(","):
        named = {step.name: step for step in steps if step.name.startswith(word.strip())}
        if not named:
            known = ", ".join(step.name for step in steps)
            raise ValueError(f"--only names '{word}', and no step begins with it; steps are {known}")
        found |= {name: step for name, step in named.items() if name not in found}
    return list(found.values())


def gpu(predictor: Path | None = None, out: Path | None = None, only: str | None = None) -> int:
    """Runs every check that needs a GPU and writes one folder with all results.

    Args:
        predictor: Folder that train.py wrote for the bundled model; by default outputs/predictor,
            which is trained first if it does not exist.
        out: Folder of the results; by default docs/results/, the GPU's name and the date.
        only: Steps to run, in this order: names or their beginnings, separated by commas. A predictor is then trained
            only if its step is named.

    Returns:
        The number of steps that failed.

    Raises:
        ValueError: If there is no GPU, the folder exists already, or no step is called so.
    """
    gpus = torch.cuda.device_count()
    if not gpus:
        raise ValueError("torch finds no CUDA device; run this on a machine with a GPU and a torch built for CUDA")
    device = torch.cuda.get_device_name(0)
    predictor = predictor or (DEFAULT if (DEFAULT / "config.json").exists() else None)
    steps = all_steps(gpus, predictor, Path("outputs/gpu"))
    if only is not None:
        steps = chosen(steps, only)
    return run_and_say(steps, f"{gpus} x {device}", GPU, out or results_folder(device, GPU))


def main() -> None:
    """Command line; in a pipe, the last line of stdout is JSON."""
    with user_errors():
        failed = from_command_line(gpu)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
