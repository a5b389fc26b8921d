"""A full disk, and SIGTERM, while something is written: one error line, and nothing half-written."""

import os
import pathlib
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.files import sha256
from data.traces.store import open_trace
from predictor.checkpoint import load_predictor
from stress.faults.commands import ROOT, Ended, files, make_room, run, small_disk
from stress.faults.fault import Fault
from stress.faults.lost_ranks import write_run
from tests.helpers.made_up_trace import make_layout, time_splits, write_trace
from tests.helpers.models import write_table

Words = list[object]
Writer = tuple[str, Callable[[Path, Path], Words], Callable[[Path], object]]
"""A command that writes: its module, its words, and a reader of what it writes.

The words depend on the folder of its inputs and on where to write."""


def collecting(folder: Path, out: Path) -> Words:
    """Words of `data.collect`: some shards of a random model's trace."""
    words = ["--batching.batches=200", "--batching.smallest=2", "--batching.largest=2", "--batching.length=48"]
    return ["--model", folder / "model", "--text", folder / "words.txt", "--out", out / "trace", *words]


def converting(folder: Path, out: Path) -> Words:
    """Words of `data.convert`: random loads."""
    np.save(folder / "loads.npy", np.random.default_rng(0).integers(0, 10**6, (600, 4, 32)))
    return [folder / "loads.npy", "--out", out / "trace"]


def training(folder: Path, out: Path) -> Words:
    """Words of `train.py`: a short run on a made-up trace."""
    trace, model = folder / "trace", folder / "table"
    if not trace.exists():
        trace.mkdir()
        write_trace(trace, make_layout(str(write_table(model))), time_splits(24, 6, 8))
    words = [f"--data.trace={trace}", f"--data.model={model}", "--trainer.enable_progress_bar=false"]
    return ["--config", ROOT / "configs" / "smoke.yaml", *words, f"--predictor={out / 'predictor'}"]


def reporting(folder: Path, out: Path) -> Words:
    """Words of `runtime.infer`."""
    given = ["--model", folder / "model", "--predictor", folder / "predictor", "--text", folder / "words.txt"]
    return [*given, "--devices=4", "--redundant=4", "--batches=4", "--check=false", "--out", out / "out"]


def _report(out: Path) -> object:
    return (out / "out" / "report.json").read_text()


WRITERS: dict[str, Writer] = {
    "trace": ("data.collect", collecting, lambda out: list(open_trace(out / "trace").traces())),
    "conversion": ("data.convert", converting, lambda out: open_trace(out / "trace").loads()),
    "predictor": ("train", training, lambda out: load_predictor(out / "predictor")),
    "report": ("runtime.infer", reporting, _report),
}
KIB = {"trace": 56, "conversion": 200, "predictor": 40, "report": 4}
"""Size of a disk that is full in the middle of the writing."""


def _run(what: str, folder: Path, out: Path, before: str = "") -> Ended:
    module, words, _ = WRITERS[what]
    return run(module, *words(folder, out), folder=folder, before=before)


def full(what: str, folder: Path) -> str:
    """Runs a command on a disk that is too small, and again once there is room."""
    write_run(folder)
    (folder / "elsewhere").mkdir()
    whole = _run(what, folder, folder / "elsewhere").succeeded()
    with small_disk(folder, KIB[what]) as disk:
        line = _run(what, folder, disk).refused()
        assert "No space left on device" in line, line
        assert (left := _final(disk)) == [], f"{left} is there after {line}"
        make_room(disk)
        _run(what, folder, disk).succeeded()
        WRITERS[what][2](disk)
        if what in ("trace", "conversion"):
            assert _digests(disk) == _digests(folder / "elsewhere"), "the files differ from those of an unbroken run"
    del whole
    return f"exit code 2: {line.replace(str(folder), '')}; with room, the same command ended well"


def _final(out: Path) -> list[str]:
    """Results under their final names."""
    names = ("trace", "predictor", "out/report.json", "out/balancedness.png")
    return [name for name in names if (out / name).exists()]


def _digests(out: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted((out / "trace").glob("*.parquet"))}


def strike() -> None:
    """Has this process send itself SIGTERM when it is about to give its first file its final name."""
    before = pathlib.Path.replace

    def replace(self: Path, target: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return before(self, target)

    pathlib.Path.replace = replace  # type: ignore[method-assign]


def terminated(what: str, folder: Path) -> str:
    """Ends a command by SIGTERM while it writes, and runs it again."""
    write_run(folder)
    out = folder / "written"
    out.mkdir()
    ended = _run(what, folder, out, before=f"{__name__}:strike")
    assert ended.code in (-signal.SIGTERM, 128 + signal.SIGTERM), f"exit code {ended.code}: {ended.err[-1500:]}"
    assert "Traceback" not in ended.err, ended.err[-1500:]
    assert (left := _final(out)) == [], f"{left} is there"
    hidden = [name for name in files(out) if "/." in f"/{name}"]
    assert not hidden, f"temporary files are left: {hidden}"
    _run(what, folder, out).succeeded()
    WRITERS[what][2](out)
    return f"exit code {ended.code}: {ended.line or 'nothing said'}; the same command then ended well"


FAULTS = [
    Fault(
        f"disk full, {what}", f"a disk of {KIB[what]} KiB while `{module}` writes",
        "exit code 2 and one line; nothing under the final name; with room the same command ends well",
        partial(full, what),
    )
    for what, (module, _, _) in WRITERS.items()
] + [
    Fault(
        f"SIGTERM, {what}", f"SIGTERM while `{module}` writes a file",
        "ends at once; nothing under the final name, no temporary file; the same command then ends well",
        partial(terminated, what),
    )
    for what, (module, _, _) in WRITERS.items()
]  # fmt: skip
