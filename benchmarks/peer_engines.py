"""SGLang's and vLLM's own placement code reads our exports, carries out our moves, and places beside us.

    python -m benchmarks.peer_engines                    # downloads the pinned wheels into outputs/peers
    python -m benchmarks.peer_engines --folder FOLDER    # where they are unpacked already

Prints what was checked, three tables and, in a pipe, one line of JSON; exit code 1 if a check fails, 2 without the
wheels. TensorRT-LLM and vllm-ascend cannot run on a CPU: tests/helpers/engine_twins.py has their rules.

Shape suffixes: L MoE layers, E logical experts, P slots, G devices.
"""

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.support import peer_wheels
from data.arrays import IntArray
from data.cli import print_json
from data.traces.loads import read_loads
from runtime.balancing.eplb import rebalance_experts
from runtime.balancing.plan import ReplicationPlan
from runtime.balancing.split import balancedness
from runtime.export.check import check_plan
from runtime.export.export import export_plan
from runtime.export.source import plan_from_loads
from runtime.export.vllm_policy import FewMovesPolicy, register

ROOT = Path(__file__).parents[1]
RECORDED = {name: ROOT / "tests" / "runtime" / "recorded" / f"{name}.npz" for name in ("gptoss20b", "dsv2lite")}
DEVICES, REDUNDANT = 8, 16
EVERY = 4
"""Steps between two placements, and steps that each is made from."""


def sglang_reads(
    path: Path, layers: int, experts: int, redundant: int, devices: int, dispatch: str | None
) -> list[Any]:
    """What each rank of SGLang makes of `--init-expert-location`."""
    from sglang.srt.eplb import expert_location

    peer_wheels.SGLANG |= {"file": str(path), "redundant": redundant, "devices": devices, "dispatch": dispatch}
    config = expert_location.ModelConfigForExpertLocation(layers, experts)
    expert_location.ModelConfigForExpertLocation.from_model_config = staticmethod(lambda _: config)
    read = expert_location.compute_initial_expert_location_metadata
    return [read(None, rank) for rank in range(devices)]


def check_sglang(folder: Path) -> int:
    """Every rank reads our maps as they are, with a slot for every expert; returns the maps read."""
    count = 0
    for recording in RECORDED.values():
        loads = read_loads(recording).loads
        layers, experts = loads.shape[1:]
        done = export_plan(loads, "sglang", folder / "sglang.json", layers=f"1-{layers}", hidden_layers=layers + 2)
        for dispatch in ("static", "dynamic", None):
            for found in sglang_reads(done.path, layers + 2, experts, REDUNDANT, DEVICES, dispatch):
                rows = found.physical_to_logical_map.numpy()
                assert (rows[1 : layers + 1] == done.saved.plan.phy2log).all()
                assert int(found.logical_to_all_physical_map_num_valid.min()) >= 1
                count += 1
    return count


def sglang_mistakes(folder: Path) -> dict[str, dict[str, Any]]:
    """What SGLang does with files that are wrong, beside what check-plan says: E 4, R 2, two devices, two layers."""
    good = [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]]
    key = "physical_to_logical_map"
    files = {
        "nothing": {key: good},
        "an expert without a slot": {key: [good[0], [0, 2, 1, 0, 1, 2]]},
        "-1 in a slot": {key: [good[0], [3, 2, 1, 0, -1, 2]]},
        "an expert twice on a device": {key: [good[0], [3, 2, 3, 0, 1, 2]]},
        "one row of two": {key: good[:1]},
        "two slots too many": {key: [[*row, 0, 1] for row in good]},
        "an expert that does not exist": {key: [good[0], [3, 2, 1, 0, 3, 4]]},
        "another key": {key: good, "more": 1},
    }
    found: dict[str, dict[str, Any]] = {}
    for name, document in files.items():
        path = folder / "mistake.json"
        path.write_text(json.dumps(document))
        said: dict[str, Any] = {}
        for dispatch in ("static", "dynamic"):
            try:
                sglang_reads(path, 2, 4, 2, 2, dispatch)
                said[dispatch] = "accepted"
            except Exception as error:
                said[dispatch] = type(error).__name__
        said["check-plan"] = len(check_plan(path, 2, 4, 2, hidden_layers=2).problems)
        found[name] = said
    assert found["nothing"] == {"static": "accepted", "dynamic": "accepted", "check-plan": 0}
    assert all(said["check-plan"] for name, said in found.items() if name != "nothing")
    return found


def check_vllm(folder: Path) -> int:
    """VLLM derives our maps from our exports, has no rounds for no change, and takes our policy; returns the layers."""
    from vllm.distributed.eplb.eplb_state import compute_logical_maps
    from vllm.distributed.eplb.migration_scheduler import schedule_migration_batches_for_layers
    from vllm.distributed.eplb.policy import EPLB_POLICIES, AbstractEplbPolicy, DefaultEplbPolicy

    count = 0
    for recording in RECORDED.values():
        plan = export_plan(read_loads(recording).loads, "vllm", folder / "vllm.json").saved.plan
        rows = torch.tensor(json.loads((folder / "vllm.json").read_text()))
        slots, copies = compute_logical_maps(rows, plan.num_experts)
        assert (copies.numpy() == plan.replica_count).all()
        assert (slots.numpy() == plan.log2phy).all()
        no_change = schedule_migration_batches_for_layers(plan.slots_per_device, rows.numpy(), rows.numpy())
        assert no_change == [[] for _ in rows]
        count += len(rows)
    try:
        assert issubclass(register(), AbstractEplbPolicy)
        assert EPLB_POLICIES["default"].rebalance_experts(torch.ones(1, 4), 6, 1, 1, 2).shape == (1, 6)
    finally:
        EPLB_POLICIES["default"] = DefaultEplbPolicy
    return count


def move(rank: int, port: int, folder: Path, old: IntArray, new: IntArray, results: Any) -> None:
    """One of two ranks of vLLM's mover: slots with weights of the old map's experts, then of the new one's."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    peer_wheels.install(folder)
    from vllm.distributed.eplb.eplb_communicator import TorchDistGlooStagedEplbCommunicator
    from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace

    torch.accelerator.current_stream = lambda *_: peer_wheels.StandIn("stream")  # type: ignore[assignment]
    dist.init_process_group("gloo", rank=rank, world_size=2)
    size = old.shape[1] // 2
    mine = slice(rank * size, (rank + 1) * size)

    def weights(experts_LP: IntArray) -> list[list[torch.Tensor]]:
        """Two tensors a layer, whose values tell layer and expert."""
        own = torch.from_numpy(experts_LP[:, mine].copy()).float()[..., None]
        layer = torch.arange(len(own)).float()[:, None, None]
        return [list(pair) for pair in zip((own + 1000 * layer).expand(-1, -1, 64).clone(),
                                           (-own - 1000 * layer).expand(-1, -1, 32).clone(), strict=True)]  # fmt: skip

    held = weights(old)
    group = dist.group.WORLD
    communicator = TorchDistGlooStagedEplbCommunicator(group)
    began = time.perf_counter()
    rearrange_expert_weights_inplace(
        torch.from_numpy(old), torch.from_numpy(new), held, [torch.empty_like(part) for part in held[0]], group,
        communicator,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    right = all(torch.equal(a, b) for x, y in zip(held, weights(new), strict=True) for a, b in zip(x, y, strict=True))
    results.put((rank, right, seconds))
    dist.destroy_process_group()


def check_mover(folder: Path) -> dict[str, Any]:
    """VLLM's own mover takes our placement for the first step to the one for the last, between two gloo processes."""
    loads = torch.from_numpy(read_loads(RECORDED["gptoss20b"]).loads)
    slots = loads.shape[2] + REDUNDANT
    first = FewMovesPolicy.rebalance_experts(loads[0], slots, 1, 1, 2)
    old, new = first.numpy(), FewMovesPolicy.rebalance_experts(loads[-1], slots, 1, 1, 2, first).numpy()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=move, args=(rank, port, folder, old, new, results)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    try:
        found = [results.get(timeout=240) for _ in ranks]
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
    assert all(right for _, right, _ in found), found
    return {"slots": old.size, "changed": int((old != new).sum()), "seconds": round(max(each[2] for each in found), 3)}


Policy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def policies(experts: int) -> dict[str, Policy]:
    """Placements of 8 devices from a load `[L, E]` and the placement now `[L, P]`."""
    from sglang.srt.eplb.eplb_algorithms import deepseek
    from vllm.distributed.eplb.policy import DefaultEplbPolicy

    slots = experts + REDUNDANT
    return {
        "vLLM's EPLB": lambda load, now: DefaultEplbPolicy.rebalance_experts(load, slots, 1, 1, DEVICES, now),
        "SGLang's copy of DeepSeek's EPLB": lambda load, now: deepseek.rebalance_experts(
            load, slots, 1, 1, DEVICES, False
        )[0],
        "our rebalance_experts": lambda load, now: rebalance_experts(load, slots, 1, 1, DEVICES)[0],
        "our FewMovesPolicy": lambda load, now: FewMovesPolicy.rebalance_experts(load, slots, 1, 1, DEVICES, now),
    }


def even_loads(load_LE: IntArray, plan: ReplicationPlan) -> IntArray:
    """Load of each device under an even split, `[L, G]`."""
    share = np.take_along_axis(load_LE / plan.replica_count, plan.phy2log, axis=-1)
    loads: IntArray = share.reshape(len(share), DEVICES, -1).sum(-1)
    return loads


def side_by_side(recording: Path) -> dict[str, dict[str, float]]:
    """Placement every few steps from the loads of the last ones, judged on the next ones."""
    from vllm.distributed.eplb.migration_scheduler import schedule_migration_batches_for_layers

    loads = read_loads(recording).loads
    steps, layers, experts = loads.shape
    result = {}
    for name, policy in policies(experts).items():
        now = torch.arange(experts + REDUNDANT).repeat(layers, 1) % experts
        policy(torch.from_numpy(loads[0]).float(), now)  # compiled before it is timed
        balance, changed, arrived, rounds, times = list[float](), list[int](), list[int](), list[int](), list[float]()
        for step in range(EVERY, steps, EVERY):
            load = torch.from_numpy(loads[step - EVERY : step].sum(0)).float()
            began = time.perf_counter()
            new = policy(load, now)
            times.append(1e3 * (time.perf_counter() - began))
            size = new.shape[1] // DEVICES
            batches = schedule_migration_batches_for_layers(size, now.numpy(), new.numpy())
            rounds.append(sum(map(len, batches)))
            arrived.append(sum(len(flow.expert_ids) for layer in batches for batch in layer for flow in batch))
            changed.append(int((now != new).sum()))
            plan, now = ReplicationPlan(new.numpy(), DEVICES), new
            balance += [float(np.nanmean(balancedness(even_loads(each, plan)))) for each in loads[step : step + EVERY]]
        per_layer = layers * len(rounds)
        result[name] = {
            "balancedness": round(float(np.mean(balance)), 3),
            "slots changed a layer": round(sum(changed) / per_layer, 1),
            "experts sent a layer": round(sum(arrived) / per_layer, 1),
            "vLLM's rounds a layer": round(sum(rounds) / per_layer, 2),
            "ms a placement": round(float(np.median(times)), 2),
        }
    return result


def forecasts(recording: Path) -> dict[str, float]:
    """Balancedness of a plan from the first half of a recording that stays for the second, by forecast."""
    loads = read_loads(recording).loads
    half = len(loads) // 2
    found = {}
    for name in ("mean", "ema", "last"):
        plan = plan_from_loads(loads[:half], DEVICES, REDUNDANT, name)
        found[name] = round(
            float(np.mean([np.nanmean(balancedness(even_loads(each, plan))) for each in loads[half:]])), 3
        )
    return found


def show(title: str, rows: dict[str, dict[str, Any]], console: Console) -> None:
    """One table, a row for each entry."""
    table = Table(title=title)
    columns = list(next(iter(rows.values())))
    for column in ("", *columns):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        table.add_row(name, *(str(row[column]) for column in columns))
    console.print(table)


def main() -> None:
    """Runs all checks; one that fails does not stop the others."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "peers", help="where the wheels are unpacked")
    folder = parser.parse_args().folder.resolve()
    try:
        peer_wheels.fetch(folder)
    except (RuntimeError, OSError) as error:
        sys.stderr.write(f"error: {error}; give a folder where they are unpacked: --folder FOLDER\n")
        raise SystemExit(2) from None
    peer_wheels.install(folder)
    console = Console(width=None if sys.stdout.isatty() else 120)
    found: dict[str, Any] = {"wheels": list(peer_wheels.WHEELS.values())}
    failed = []
    with tempfile.TemporaryDirectory() as place:
        checks: dict[str, Callable[[], Any]] = {
            "SGLang reads our maps on every rank": partial(check_sglang, Path(place)),
            "SGLang and files that are wrong": partial(sglang_mistakes, Path(place)),
            "vLLM derives our maps and takes our policy": partial(check_vllm, Path(place)),
            "vLLM's mover carries out our change": partial(check_mover, folder),
            **{f"placements, {name}": partial(side_by_side, path) for name, path in RECORDED.items()},
            **{f"forecasts, {name}": partial(forecasts, path) for name, path in RECORDED.items()},
        }
        for name, check in checks.items():
            try:
                found[name] = check()
            except Exception as error:
                failed.append(name)
                found[name] = f"failed: {type(error).__name__}: {error}"
            if isinstance(found[name], dict) and isinstance(next(iter(found[name].values())), dict):
                show(name, found[name], console)
            else:
                console.print(f"{name}: {found[name]}", markup=False, highlight=False)
    print_json(found)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
