"""Ranks: the processes that torchrun started, or this one alone."""

import os
from types import TracebackType

import torch.distributed as dist


class Ranks:
    """This process among those that share a job; a process group is opened only where there are several.

    Attributes:
        rank: 0..world - 1.
        world: Number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    @staticmethod
    def is_first() -> bool:
        """Whether this process is the one that reports."""
        return int(os.environ.get("RANK", 0)) == 0

    def __enter__(self) -> "Ranks":
        if self.world > 1:
            dist.init_process_group("gloo")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.world > 1:
            dist.barrier()
