"""Step: a command with a timeout; `run_all` runs several and writes what each printed, and a summary, to one folder."""

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.support.results import Results
from data.cli import from_command_line, print_json, user_errors
from data.files import check_new, read_json, whole_file, write_json

LIBRARIES = ("torch", "transformers", "numpy", "numba", "safetensors", "triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
SETTINGS = ("CUDA_", "NCCL_", "TORCH_", "OMP_", "PYTORCH_")
NOT_STARTED = 127
MOST_LINES = 60
"""Lines of a step's output that the page shows."""
KILL_S = 10.0
"""Seconds between the two signals that end a step whose time is up."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Its name, and that of its files.
        command: The words of the command line.
        timeout_s: Seconds after which the command and its children are ended.
        env: Environment variables it is given beside those of this process.
        counted: Text whose lines on stderr are counted, such as a warning's; none by default.
        pictures: Files that it draws, of which the folder gets copies.
        files: Other files that it writes, likewise.
    """

    name: str
    command: list[str]
    timeout_s: float
    env: dict[str, str] = field(default_factory=dict)
    counted: str = ""
    pictures: tuple[Path, ...] = ()
    files: tuple[Path, ...] = ()


def run_step(step: Step, out: Path) -> dict[str, Any]:
    """Runs a step; what it prints goes to `NAME.txt`, stderr to `NAME.log`.

    A JSON document on its last line also goes to `NAME.json`.

    Returns:
        The step's command, environment, `status` (ok, failed or timed out), exit code and seconds, and the number of
        counted lines.
    """
    began = time.perf_counter()
    printed, said = out / f"{step.name}.txt", out / f"{step.name}.log"
    code = _exit_code(step, printed, said)
    found: dict[str, Any] = {
        "name": step.name, "command": as_typed(step.command), "env": step.env,
        "status": {0: "ok", None: "timed out"}.get(code, "failed"), "exit_code": code,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    if step.counted:
        found["counted"] = {step.counted: sum(step.counted in line for line in said.read_text().splitlines())}
    if (document := last_json(printed.read_text())) is not None:
        write_json(out / f"{step.name}.json", document)
    if code == 0:
        found["pictures"] = [copied(picture, out / f"{step.name}-{picture.name}") for picture in step.pictures]
        found["files"] = [copied(file, out / f"{step.name}-{file.name}") for file in step.files]
    return found


def copied(file: Path, path: Path) -> str:
    """Copies a file; returns its new name."""
    with whole_file(path) as aside:
        shutil.copyfile(file, aside)
    return path.name


def _exit_code(step: Step, printed: Path, said: Path) -> int | None:
    """Exit code of a step's command: None if its time was up, and 127, as in a shell, if it could not be started."""
    with printed.open("w") as stdout, said.open("w") as stderr:
        try:
            process = subprocess.Popen(
                step.command, stdout=stdout, stderr=stderr, env=os.environ | step.env, start_new_session=True
            )
        except OSError as error:
            stderr.write(f"{error}\n")
            return NOT_STARTED
        try:
            return process.wait(step.timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            return None
        except BaseException:  # Ctrl-C
            _end(process)
            raise


def as_typed(command: list[str]) -> str:
    """A command line as a user types it."""
    return shlex.join("python" if word == sys.executable else word for word in command)


def _end(process: subprocess.Popen[Any]) -> None:
    """Ends a command and its children: asked first, killed if they do not follow."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(KILL_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    process.wait()


def last_json(text: str) -> dict[str, Any] | None:
    """The JSON object on the last line of a text, if there is one."""
    lines = text.strip().splitlines()
    try:
        document = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None


def processor() -> str:
    """The processor's name without marks and speed, such as "Intel Xeon"."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    name = next((line.split(":", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    words = name.split("@")[0].replace("(R)", "").replace("(TM)", "").replace("CPU", "").split()
    return " ".join(words) or platform.machine()


def machine() -> dict[str, Any]:
    """Versions, devices, commit and settings that decide results; nothing that names the machine or its user."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(), "system": platform.system(), "processor": processor(),
        "cores": os.cpu_count(), "libraries": found, "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "driver": _output("nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"),
        "topology": _output("nvidia-smi", "topo", "-m"), "commit": _output("git", "rev-parse", "HEAD"),
        "changed_files": len(_output("git", "status", "--porcelain").splitlines()),
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)},
    }  # fmt: skip


def results_folder(hardware: str, command: str) -> Path:
    """Where results go today: docs/results/, the hardware's name, the date, and which results they are."""
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    kind = re.sub(r"^make (gpu|bench-?)?", "", command)
    return Path("docs/results") / "-".join(filter(None, [slug, date.today().isoformat(), kind]))


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def run_all(steps: list[Step], out: Path, title: str, command: str) -> list[dict[str, Any]]:
    """Runs steps in order, whatever happens to each; summary.json and README.md are rewritten after every one.

    Args:
        steps: The steps.
        out: The folder.
        title: The page's title.
        command: What the user typed, for those who read the folder.
    """
    out.mkdir(parents=True)
    facts, done = machine(), list[dict[str, Any]]()
    for number, step in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {step.name}, at most {step.timeout_s:.0f} s", file=sys.stderr, flush=True)
        done.append(run_step(step, out))
        print(f"        {done[-1]['status']} after {done[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
        _write(out, title, {"command": command, "machine": facts, "steps": done})
    return done


def run_again(steps: list[Step], names: str, out: Path, command: str) -> int:
    """Runs some steps of a folder again; their results take the place of the earlier ones, and the page says so.

    A step whose turns differ much, because the machine did other work meanwhile, need not cost the whole folder. Steps
    that the folder lacks are added to it. If a step fails, its earlier results stay.

    Args:
        steps: All steps of the folder's command.
        names: Names of those to run, with commas.
        out: The folder.
        command: What the user typed to write the folder.

    Returns:
        The number of steps that failed.

    Raises:
        ValueError: If the folder holds no results, or those of another command, or a name is that of no step.
    """
    if (wrote := Results(out).command) != command:
        raise ValueError(f"{out} was written by {wrote}, not by {command}; use the module of that command")
    wanted, of = [name.strip() for name in names.split(",")], {step.name: step for step in steps}
    if unknown := [name for name in wanted if name not in of]:
        raise ValueError(f"--again names '{unknown[0]}', expected steps of {command}: {', '.join(of)}")
    summary, title = read_json(out / "summary.json"), (out / "README.md").read_text().splitlines()[0].removeprefix("# ")
    done, failed = summary["steps"], 0
    for name in wanted:
        print(f"{name}, at most {of[name].timeout_s:.0f} s", file=sys.stderr, flush=True)
        with TemporaryDirectory(dir=out) as aside:
            found = run_step(of[name], Path(aside))
            kept = list(Path(aside).iterdir()) if found["status"] == "ok" else [Path(aside) / f"{name}.log"]
            for file in kept:
                file.replace(out / file.name)
        print(f"        {found['status']} after {found['seconds']:.0f} s", file=sys.stderr, flush=True)
        if found["status"] != "ok":
            failed += 1
            print(f"        what it said is in {out / name}.log; earlier results stay", file=sys.stderr, flush=True)
            continue
        found |= {"again": {"date": date.today().isoformat(), "commit": machine()["commit"]}}
        place = next((number for number, step in enumerate(done) if step["name"] == name), len(done))
        done[place : place + 1] = [found]
        _write(out, title, summary)
    return failed


def _write(out: Path, title: str, summary: dict[str, Any]) -> None:
    """Writes the folder's summary.json and README.md."""
    write_json(out / "summary.json", summary)
    with whole_file(out / "README.md") as aside:
        aside.write_text(page(title, summary["machine"], summary["steps"], out))


def run_and_say(steps: list[Step], hardware: str, command: str, out: Path | None = None) -> int:
    """Runs steps as `run_all` does, says how many are ok, and prints a line of JSON.

    Args:
        steps: The steps.
        hardware: Processor or GPUs, for the page's title.
        command: What the user typed.
        out: The folder; by default that of `results_folder`.

    Returns:
        The number of steps that failed.

    Raises:
        ValueError: If the folder exists already.
    """
    out = out or results_folder(hardware, command)
    check_new(out)
    done = run_all(steps, out, f"{hardware}, {date.today()}", command)
    failed = [step["name"] for step in done if step["status"] != "ok"]
    print(f"{len(done) - len(failed)} of {len(done)} steps are ok; results are in {out}", file=sys.stderr)
    print_json({"out": str(out), "steps": len(done), "failed": failed})
    return len(failed)


def folder_from_command_line(
    command: str, preparation: Callable[[], list[Step]], measurements: Callable[[], list[Step]]
) -> None:
    """Command line that measures and writes a folder of results; if a step fails, the exit code is 1.

    Args:
        command: What the user typed.
        preparation: Makes the steps that the measurements need and that were not done yet.
        measurements: Makes the steps that are measured.
    """

    def run(out: Path | None = None, again: str | None = None) -> int:
        """Runs every benchmark and writes one folder with all results.

        Args:
            out: Folder of the results; by default docs/results/, the processor's name, the date and the kind.
            again: Names of steps to measure again, with commas, where the machine did other work, or to add.
        """
        if again is not None:
            steps = preparation() + measurements()
            return run_again(steps, again, out or results_folder(processor(), command), command)
        return run_and_say(preparation() + measurements(), processor(), command, out)

    with user_errors():
        failed = from_command_line(run)
    raise SystemExit(1 if failed else 0)


def page(title: str, facts: dict[str, Any], done: list[dict[str, Any]], out: Path) -> str:
    """A page with the machine, a table of all steps, and what each printed."""
    libraries = ", ".join(f"{name} {value}" for name, value in facts["libraries"].items())
    rows = [
        f"| {step['name']} | {status(step)} | {step['seconds']} | {counts(step)} | `{in_shell(step)}` |"
        for step in done
    ]  # fmt: skip
    parts = [
        f"# {title}", f"{', '.join(facts['devices']) or 'no GPU'}; CUDA {facts['cuda']}, {libraries}, Python "
        f"{facts['python']}; commit {facts['commit'] or 'unknown'}, {facts['changed_files']} changed files.",
        "\n".join(["| step | status | seconds | counted | command |", "|---|---|---|---|---|", *rows]),
    ]  # fmt: skip
    for step in done:
        printed = (out / f"{step['name']}.txt").read_text().splitlines()
        table = [line for line in printed if line.strip() and not line.startswith("{")]
        pictures = [f"![{name}]({name})" for name in step.get("pictures", [])]
        if table or pictures:
            parts += [f"## {step['name']}"]
        if table:
            rest = [f"... {step['name']}.txt has all"] if len(table) > MOST_LINES else []
            parts.append("\n".join(["```", *table[:MOST_LINES], *rest, "```"]))
        parts += pictures
    return "\n\n".join(parts) + "\n"


def status(step: dict[str, Any]) -> str:
    """A step's status, and when and of which commit it was measured again."""
    again = step.get("again")
    return str(step["status"]) + (f", again on {again['date']}, {again['commit'][:8]}" if again else "")


def counts(step: dict[str, Any]) -> str:
    """The counted lines of a step, for the table."""
    return ", ".join(f"{number} x {text}" for text, number in step.get("counted", {}).items())


def in_shell(step: dict[str, Any]) -> str:
    """A step as it is typed: environment variables, then the command."""
    return " ".join([*(f"{name}={value}" for name, value in step["env"].items()), step["command"]])
