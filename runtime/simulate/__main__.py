"""Is replication worth it on this traffic? Replays recorded loads through every policy and says so.

    python -m runtime.simulate outputs/traces/switch-mini-64 --devices 8 --redundant 16 --predictor outputs/predictor

prints the verdict, a table and, in a pipe, the report as one JSON document in the last line of stdout.

    python -m runtime.simulate FOLDER_OF_RECORDINGS --redundant 8,16,32 --jobs 8

prints one row for each recording and setting.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data.cli import from_command_line, print_json, user_errors
from data.files import check_file, check_folder
from runtime.simulate.comparison import PLANNERS, RENEW_EVERY
from runtime.simulate.job import Job
from runtime.simulate.replay import SPLITS
from runtime.simulate.report import engines_table, table, verdict_panel
from runtime.simulate.serving import Order, Serve
from runtime.simulate.sweep import grid, sweep
from runtime.simulate.sweep_report import sweep_table
from runtime.simulate.workers import WorkerLostError


def simulate(
    loads: Path,
    devices: int | str = 8,
    redundant: int | str = 16,
    forecast: str | None = None,
    planner: str = ",".join(PLANNERS),
    split: str = ",".join(SPLITS),
    predictor: Path | None = None,
    start: int = 1,
    steps: int | None = None,
    max_moves: int | str | None = None,
    devices_per_node: int | None = None,
    groups: int | None = None,
    save_plans: Path | None = None,
    out: Path = Path("outputs/simulate"),
    expert_bytes: float | None = None,
    tokens_per_second: float | None = None,
    link_bytes_per_second: float | None = None,
    node_link_bytes_per_second: float | None = None,
    expert_overhead_tokens: float | None = None,
    gpu: str | None = None,
    like: str | None = None,
    precision: str | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    top_k: int | None = None,
    tokens_per_step: float | str | None = None,
    renew_every: int = RENEW_EVERY,
    serve: Serve | None = None,
    slots: int | None = None,
    chunk: int | None = None,
    order: Order = "subject",
    stream: str = "test",
    jobs: int | None = None,
    ray: str | None = None,
) -> dict[str, Any]:
    """Replays recorded loads through replication policies and decides whether replication is worth it.

    Args:
        loads: Trace folder, or a recording that `data/traces/loads.py` lists, such as .npy of [steps, layers, experts];
            or a folder of recordings, which are all replayed.
        devices: Devices that the experts are spread over. Of devices, redundant, max_moves, tokens_per_step and gpu,
            several may be tried: `--devices 8,16`.
        redundant: Replica slots of each layer over all devices.
        forecast: Some of last,mean,ema,own,learned,adaptive,oracle,exact; 'own' is each request's past, 'adaptive' the
            predictor corrected by the loads observed so far, 'exact' the oracle, planned only once the load is known,
            so that its moves delay the batch. By default all but exact, learned and adaptive only with a predictor,
            and own only with --serve.
        planner: Some of contiguous,eplb,home,moving,timed: the home planner with homes that move; and balancing device
            times, of which an active expert takes --expert-overhead-tokens (with quota), instead of tokens.
        split: Some of even,quota.
        predictor: Folder that train.py wrote, for the forecasts 'learned' and 'adaptive'.
        start: First step that is planned, counted without steps that hold no tokens; homes are chosen from the steps
            before it.
        steps: Number of steps to plan; by default all.
        max_moves: Most experts that the home planner moves before a step, over all layers; by default no limit.
        devices_per_node: Devices that share a fast network; by default all.
        groups: Groups of consecutive experts that stay on one node, copies included, as group-limited routing wants it;
            for all planners. By default none.
        save_plans: File (.npz) for phy2log [N, L, P] and device_load [N, L, G] of each policy, home_slots [N, L, E]
            where devices have different numbers of homes or homes move, and for layers [L], the numbers of these layers
            in the recording: layers without tokens are left out.
        out: Folder for balancedness.png and report.json, or for sweep.png, sweep.json and the reports of all jobs.
        expert_bytes: Bytes of one expert; by default from the trace, or a Switch-base expert in bf16.
        tokens_per_second: Tokens a device computes per second; by default measured on this machine.
        link_bytes_per_second: Bytes a device can receive per second; by default measured on this machine.
        node_link_bytes_per_second: Bytes a device can receive from another node per second; by default as within one,
            while a move between nodes must save four times as much.
        expert_overhead_tokens: Tokens a device computes while it reads one more expert; by default measured.
        gpu: Take times from tables measured on this GPU: a100_sxm, h100_sxm, h200_sxm, b200_sxm or l40s. Moves,
            forecasts, dispatch and combine are included.
        like: Model whose expert sizes are taken, such as deepseek_v3; by default the recorded trace's.
        precision: Precision of the weights, as the tables name it; by default the model's usual one.
        hidden_size: Width of the hidden states, where the model has no name here.
        intermediate_size: Inner width of an expert, likewise.
        top_k: Experts of a token, likewise.
        tokens_per_step: Tokens of a step in the deployment that is asked about; by default as recorded. More tokens
            keep the recorded shares, fewer are drawn from them.
        renew_every: Steps between the plans of engines that renew them; judged beside a plan that is kept.
        serve: Serve the requests of a token trace again instead of replaying its batches: 'prefill' in chunks whose
            tokens are known ahead, 'decode' token by token, the next token unknown.
        slots: Requests in a step with --serve; by default 4 for prefill, 32 for decode.
        chunk: Most tokens of a request in a prefill step; by default 128.
        order: Whether requests are served 'subject' after subject or 'shuffled'.
        stream: Requests that --serve plans for: 'test' (the test split, after training requests as history), a phase
            such as 'unseen', or 'all'.
        jobs: Processes of a sweep, that is where there are several recordings or settings; by default one for each
            processor.
        ray: Address of a Ray cluster that runs the jobs of a sweep: auto, ray://host:10001, or local for one on this
            machine. Its machines must see the recordings under the same paths.
    """
    given = {name: value for name, value in locals().items() if name in Job.__dataclass_fields__}
    check_folder(out)
    if save_plans is not None:
        check_file(save_plans)
    jobs_to_run = grid(loads, given)
    console = Console(stderr=True)
    if len(jobs_to_run) == 1 and jobs is None and ray is None:
        return jobs_to_run[0].run(out, save_plans, console)
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs is {jobs}, expected 1 or more")
    if save_plans is not None:
        raise ValueError("--save-plans is for one recording and one setting; leave it out, or simulate that one alone")
    return sweep(jobs_to_run, out, jobs, ray, console)


def main() -> None:
    """Command line of `simulate`: the verdict, a table, then one JSON document."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    with user_errors("run the same command again; the finished jobs of a sweep are kept"):
        try:
            report = from_command_line(simulate)
        except WorkerLostError as error:
            raise SystemExit(f"error: {error}") from None
    console = Console(width=None if sys.stdout.isatty() else 140)
    if "rows" in report:
        console.print(sweep_table(report))
    else:
        console.print(verdict_panel(report))
        if report["engines"]:
            console.print(engines_table(report))
        console.print(table(report))
    print_json(report)


if __name__ == "__main__":
    main()
