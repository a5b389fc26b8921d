"""Sweeps: many recordings and grids of settings, each pair simulated by a worker of its own, resumable.

    python -m runtime.simulate RECORDINGS --devices 8,16 --redundant 8,16,32 --jobs 4

A job's report is kept in `OUT/jobs` as soon as the job has ended; a sweep that is started again takes it from there, as
long as settings, files and code are the same.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from data.errors import one_line
from data.files import read_json, write_json
from data.progress import progress
from data.traces.recordings import recordings
from runtime.simulate.job import Job
from runtime.simulate.sweep_report import plot
from runtime.simulate.workers import results

log = logging.getLogger(__name__)
GRID = ("devices", "redundant", "max_moves", "tokens_per_step", "gpu")
"""Settings of which a sweep may try several."""


def values(name: str, given: Any) -> list[Any]:
    """The values of a setting: `8` or `"8,16"` for numbers, `"h100_sxm,b200_sxm"` for names.

    Raises:
        ValueError: If one is not a number where numbers are expected.
    """
    if not isinstance(given, str):
        return [given]
    parts = [part.strip() for part in given.split(",")]
    if name == "gpu":
        return parts
    kind = float if name == "tokens_per_step" else int
    try:
        return list(dict.fromkeys(kind(part) for part in parts))
    except ValueError:
        raise ValueError(
            f"{name} is '{given}', expected a number, or numbers with commas between, such as 8,16"
        ) from None


def grid(loads: Path, settings: dict[str, Any]) -> list[Job]:
    """A job for each recording and each combination of the settings that have several values.

    Raises:
        ValueError: If a setting cannot be used, or there is no recording.
    """
    tried = {name: values(name, settings[name]) for name in GRID}
    combinations = [dict(zip(tried, combination, strict=True)) for combination in itertools.product(*tried.values())]
    return [
        Job(**settings | combination | {"loads": recording})
        for recording in recordings(loads)
        for combination in combinations
    ]


def sweep(
    jobs: Sequence[Job], out: Path, processes: int | None = None, ray: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Runs all jobs, and writes `sweep.json` and `sweep.png`.

    Args:
        jobs: The jobs.
        out: Folder for the results.
        processes: Processes to run jobs in, see `workers.results`.
        ray: Address of a Ray cluster; its machines must see the recordings under the same paths.
        console: Console for a progress bar.

    Returns:
        JSON document: rows, one for each job in order, with the settings that vary, and the verdict or, where the job
        was refused, the reason; `resumed`, how many of them were there already.

    Raises:
        ValueError: If no job could be run; the reason of the first one.
    """
    kept = {number: out / "jobs" / f"{job.identity}.json" for number, job in enumerate(jobs)}
    earlier = {number: _earlier(path) for number, path in kept.items() if path.exists()}
    found = {number: result for number, result in earlier.items() if result is not None}
    resumed = len(found)
    left = [number for number in kept if number not in found]
    ready = [_prepared(jobs[number]) for number in left]
    with progress(console, transient=True) as bars:
        bar = bars.add_task("jobs", total=len(jobs), completed=resumed)
        for place, result in results(run_job, ready, processes, ray):
            number = left[place]
            found[number] = result
            if "report" in result:
                write_json(kept[number], result | {"sha256": _digest(result["report"])})
            bars.advance(bar)
    if all("refused" in result for result in found.values()):
        raise ValueError(found[0]["refused"])
    rows = [_row(job, found[number]) for number, job in enumerate(jobs)]
    report = {"jobs": len(jobs), "resumed": resumed, "varied": varied(jobs), "rows": rows}
    write_json(out / "sweep.json", report)
    plot(report, out / "sweep.png")
    return report


def _earlier(path: Path) -> dict[str, Any] | None:
    """What is kept of an earlier run; None, and a warning, where the file is no longer what was written."""
    try:
        result = read_json(path)
    except ValueError:
        result = {}
    if result.get("sha256") == _digest(result.get("report")):
        return result
    log.warning("%s was edited or cut short; its job is done again", path)
    return None


def _digest(report: Any) -> str:
    return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()


def run_job(job: Job) -> dict[str, Any]:
    """The report of a job, or why it was refused; runs in a worker."""
    try:
        return {"report": job.run()}
    except (ValueError, OSError) as error:
        return {"refused": one_line(error)}


def varied(jobs: Sequence[Job]) -> list[str]:
    """Settings of which the jobs have several values."""
    return [name for name in GRID if len({getattr(job, name) for job in jobs}) > 1]


def _prepared(job: Job) -> Job:
    """The job with the speeds of this machine, so that all jobs count with the same; `run` refuses damaged traces."""
    try:
        return job.with_speeds()
    except (ValueError, OSError):
        return job


def _row(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """What stands in a row of the table."""
    row: dict[str, Any] = {"loads": str(job.loads)} | {name: getattr(job, name) for name in GRID}
    if "refused" in result:
        return row | {"refused": result["refused"]}
    report = result["report"]
    verdict = report["verdict"]
    balancedness = {(item["forecast"], item["planner"], item["split"]): item for item in report["results"]}
    row |= {
        name: verdict.get(name)
        for name in ("answer", "why", "policy", "net_gain", "interval", "step_ms", "layer_ms", "memory", "traffic")
    }
    bare = balancedness.get(("none", "contiguous", "even"))
    best = balancedness.get(tuple((verdict.get("policy") or {}).values()))
    row |= {"steps": report["steps"], "layers": report["layers"], "hardware": verdict.get("hardware")}
    row["balancedness"] = {"without": bare and bare["balancedness"], "with": best and best["balancedness"]}
    kept = (report["engines"] or {"plans": [None]})["plans"][0]
    row["kept_plan"] = kept and {name: kept[name] for name in ("answer", "net_gain", "interval", "layer_ms")}
    return row | {"moves_per_layer": best and best["moves_per_layer"]}
