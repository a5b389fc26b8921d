"""Runs a function over many jobs: in processes of this machine, or in tasks of a Ray cluster.

    for number, result in results(function, jobs, processes=4):
        ...

Results come in the order in which jobs end. A job whose worker was lost (killed, out of memory, node gone) is done
again. The function must be importable by the workers, and jobs and results must pickle.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h: the signal that a process gets when its parent ends."""
MOST_LOST = 3
"""Times a worker may be lost without any job having ended in between."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment of a worker of Ray: as many jobs run at once as there are processors, each in one thread."""


class WorkerLostError(RuntimeError):
    """Workers end before their jobs do, again and again."""


def results(
    function: Callable[[Job], Result], jobs: Sequence[Job], processes: int | None = None, ray: str | None = None
) -> Iterator[tuple[int, Result]]:
    """Yields the number of each job and its result, as jobs end.

    Args:
        function: Called with each job; an error that it raises is raised here.
        jobs: The jobs.
        processes: Processes of this machine; by default one for each processor that this process may use.
        ray: Address of a Ray cluster, as `ray.init` takes it: "auto", "ray://host:10001", or "local" for one on this
            machine with `processes` workers. None uses processes without Ray.

    Raises:
        ValueError: If Ray is not installed or the cluster cannot be reached.
        WorkerLostError: If workers are lost three times while no job ends.
    """
    count = processes or len(os.sched_getaffinity(0))
    yield from _in_processes(function, jobs, count) if ray is None else _on_ray(function, jobs, count, ray)


def _in_processes(function: Callable[[Job], Result], jobs: Sequence[Job], count: int) -> Iterator[tuple[int, Result]]:
    left, lost = dict(enumerate(jobs)), 0
    while left:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(count, len(left)), context, _begin)
        try:
            futures = {pool.submit(function, job): number for number, job in left.items()}
            for future in as_completed(futures):
                result = future.result()
                del left[futures[future]]
                lost = 0
                yield futures[future], result
        except BrokenProcessPool as error:
            lost += 1
            if lost == MOST_LOST:
                raise WorkerLostError(
                    f"worker processes were lost {lost} times with {len(left)} jobs left (was one killed, or is memory "
                    "short?); use fewer --jobs"
                ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    """Starts a worker: one thread, and, on Linux, no longer life than the process that started it."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _on_ray(
    function: Callable[[Job], Result], jobs: Sequence[Job], count: int, address: str
) -> Iterator[tuple[int, Result]]:
    try:
        import ray
    except ImportError:
        raise ValueError("--ray needs Ray; pip install 'switchcast[ray]'") from None
    settings: dict[str, Any] = {"num_cpus": count, "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": ONE_THREAD}, **settings)
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"--ray {address}: no cluster was reached there ({error})") from None
    try:
        task = ray.remote(num_cpus=1, max_retries=MOST_LOST)(function)
        numbers = {task.remote(job): number for number, job in enumerate(jobs)}
        while numbers:
            (ended,), _ = ray.wait(list(numbers))
            yield numbers.pop(ended), _of_ray(ray, ended)
    finally:
        ray.shutdown()


def _of_ray(ray: Any, reference: Any) -> Any:
    """The result of a task; what its function raised is raised as it was."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.WorkerCrashedError as error:
        raise WorkerLostError(f"a worker was lost {1 + MOST_LOST} times with the same job ({error})") from error
