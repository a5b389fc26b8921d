"""Is replication worth it on this traffic? Replays recorded loads through every policy and says so.

    python -m runtime.simulate outputs/traces/switch-mini-64 --devices 8 --redundant 16 --predictor outputs/predictor

prints the verdict, a table and, in a pipe, the report as one JSON document in the last line of stdout.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data.cli import from_command_line, print_json, user_errors
from data.files import check_folder
from data.traces.loads import RecordedLoads, read_loads
from runtime.simulate.comparison import PLANNERS, compare_policies, expert_bytes_of
from runtime.simulate.cost_model import DeviceTimes, Hardware, measure
from runtime.simulate.gpu_cost import gpu_times
from runtime.simulate.replay import SPLITS
from runtime.simulate.report import table, verdict_panel
from runtime.simulate.serving import Order, Serve, served


def simulate(
    loads: Path,
    devices: int = 8,
    redundant: int = 16,
    forecast: str | None = None,
    planner: str = ",".join(PLANNERS),
    split: str = ",".join(SPLITS),
    predictor: Path | None = None,
    start: int = 1,
    steps: int | None = None,
    max_moves: int | None = None,
    devices_per_node: int | None = None,
    save_plans: Path | None = None,
    out: Path = Path("outputs/simulate"),
    expert_bytes: float | None = None,
    tokens_per_second: float | None = None,
    link_bytes_per_second: float | None = None,
    expert_overhead_tokens: float | None = None,
    gpu: str | None = None,
    like: str | None = None,
    precision: str | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    top_k: int | None = None,
    tokens_per_step: float | None = None,
    serve: Serve | None = None,
    slots: int | None = None,
    chunk: int | None = None,
    order: Order = "subject",
    stream: str = "test",
) -> dict[str, Any]:
    """Replays recorded loads through replication policies and decides whether replication is worth it.

    Args:
        loads: Trace folder, or a recording that `data/traces/loads.py` lists, such as .npy of [steps, layers, experts].
        devices: Devices that the experts are spread over.
        redundant: Replica slots of each layer over all devices.
        forecast: Some of last,mean,ema,own,learned,adaptive,oracle,exact; 'own' is each request's past, 'adaptive' the
            predictor corrected by the loads observed so far, 'exact' the oracle, planned only once the load is known,
            so that its moves delay the batch. By default all but exact, learned and adaptive only with a predictor,
            and own only with --serve.
        planner: Some of contiguous,eplb,home.
        split: Some of even,quota.
        predictor: Folder that train.py wrote, for the forecasts 'learned' and 'adaptive'.
        start: First step that is planned, counted without steps that hold no tokens; homes are chosen from the steps
            before it.
        steps: Number of steps to plan; by default all.
        max_moves: Most experts that the home planner moves before a step, over all layers; by default no limit.
        devices_per_node: Devices that share a fast network; by default all.
        save_plans: File (.npz) for phy2log [N, L, P] and device_load [N, L, G] of each policy, and for layers [L], the
            numbers of these layers in the recording: layers without tokens are left out.
        out: Folder for balancedness.png and report.json.
        expert_bytes: Bytes of one expert; by default from the trace, or a Switch-base expert in bf16.
        tokens_per_second: Tokens a device computes per second; by default measured on this machine.
        link_bytes_per_second: Bytes a device can receive per second; by default measured on this machine.
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
        serve: Serve the requests of a token trace again instead of replaying its batches: 'prefill' in chunks whose
            tokens are known ahead, 'decode' token by token, the next token unknown.
        slots: Requests in a step with --serve; by default 4 for prefill, 32 for decode.
        chunk: Most tokens of a request in a prefill step; by default 128.
        order: Whether requests are served 'subject' after subject or 'shuffled'.
        stream: Requests that --serve plans for: 'test' (the test split, after training requests as history), a phase
            such as 'unseen', or 'all'.
    """
    check_folder(out)
    if serve is None:
        of_serving = {
            "slots": slots,
            "chunk": chunk,
            "order": order != "subject" or None,
            "stream": stream != "test" or None,
        }
        if unused := [name for name, value in of_serving.items() if value is not None]:
            raise ValueError(f"--{unused[0]} is for --serve prefill or --serve decode; add that, or leave it out")
        recorded = read_loads(loads)
    else:
        recorded, first = served(loads, serve, slots, chunk, order, stream)
        start = max(start, first)
    speeds = (expert_bytes, tokens_per_second, link_bytes_per_second, expert_overhead_tokens)
    sizes = (like, precision, hidden_size, intermediate_size, top_k)
    hardware: DeviceTimes
    if gpu is not None:
        if any(value is not None for value in speeds):
            raise ValueError("--gpu takes speeds from measured tables; leave out --expert-bytes and the other speeds")
        hardware = gpu_times(gpu, recorded, *sizes)
    elif any(value is not None for value in sizes):
        raise ValueError("--like, --precision and sizes of experts are for --gpu; add that, or leave them out")
    else:
        hardware = _speeds(recorded, *speeds)
    return compare_policies(
        recorded, devices, redundant, forecast.split(",") if forecast else None, planner.split(","), split.split(","),
        predictor, start, steps, hardware, max_moves, devices_per_node, tokens_per_step,
        out=out, save_plans=save_plans, console=Console(stderr=True),
    )  # fmt: skip


def _speeds(recorded: RecordedLoads, expert_bytes: float | None, *given: float | None) -> Hardware:
    """The speeds that were given, and those of this machine for the others."""
    nbytes = expert_bytes_of(recorded) if expert_bytes is None else expert_bytes
    measured = measure(nbytes) if None in given else None
    names = ("tokens_per_second", "bytes_per_second", "expert_overhead_tokens")
    speeds = [getattr(measured, name) if value is None else value for name, value in zip(names, given, strict=True)]
    return Hardware(nbytes, *speeds)


def main() -> None:
    """Command line of `simulate`: the verdict, a table, then one JSON document."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    with user_errors():
        report = from_command_line(simulate)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(verdict_panel(report))
    console.print(table(report))
    print_json(report)


if __name__ == "__main__":
    main()
