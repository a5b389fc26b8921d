"""Runs a function on several ranks: processes with gloo, forked from a server that has imported the slow modules."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

PRELOAD = ["torch", "transformers", "numba", "tests.conftest", "runtime.engine.engine"]


def on_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0, abandoned: int | None = None
) -> list[Any]:
    """The function's result on each rank, or the text of its error; None for a rank that was killed.

    The function is called as `function(rank, *args)`; it must be importable, and its arguments picklable. A rank that
    is `abandoned` is killed once the others have ended; its result is None unless it has one by then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, world, port, theirs, function, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results: list[Any] = [None] * world
    for rank in sorted(range(world), key=lambda rank: rank == abandoned):
        with suppress(EOFError):
            if pipes[rank].poll(0 if rank == abandoned else timeout_s):
                results[rank] = pipes[rank].recv()
            elif rank != abandoned:
                results[rank] = "hangs"
        processes[rank].join(0 if rank == abandoned else 10)
        processes[rank].kill()
    return results


def _rank(rank: int, world: int, port: int, pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        result = function(rank, *args)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        result = f"{type(error).__name__}: {error}"
    pipe.send(result)
    pipe.close()
    sys.stderr.flush()
    os._exit(0)  # without joining threads, because a test's forecaster may hang
