"""watched_collectives: shows a test every call of torch.distributed that moves tensors, before and around it."""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._pytree import tree_leaves

OPERATIONS = (
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "all_to_all", "all_to_all_single",
    "batch_isend_irecv", "broadcast", "gather", "irecv", "isend", "recv", "reduce", "reduce_scatter_tensor", "scatter",
    "send",
)  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """One call of an operation of torch.distributed.

    Attributes:
        operation: Name of the function.
        arguments: Its arguments by name.
        group: The process group.
        tensors: The tensors it sends and receives.
        thread: Name of the calling thread.
    """

    operation: str
    arguments: dict[str, Any]
    group: Any
    tensors: tuple[Tensor, ...]
    thread: str

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Collective":
        """Reads a call before it is made."""
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        pairs = arguments.get("p2p_op_list")
        group = pairs[0].group if pairs else arguments.get("group")
        tensors = [pair.tensor for pair in pairs] if pairs else tree_leaves(arguments)
        found = tuple(tensor for tensor in tensors if isinstance(tensor, Tensor))
        return cls(function.__name__, arguments, group or dist.group.WORLD, found, threading.current_thread().name)

    @property
    def on_cuda(self) -> bool:
        """Whether NCCL would carry it; gloo carries tensors on the host."""
        return any(tensor.is_cuda for tensor in self.tensors)

    @property
    def group_name(self) -> str:
        """'default' for the group of all ranks that is opened first, else the group's own name."""
        return "default" if self.group is dist.group.WORLD else str(self.group.group_name)


@contextmanager
def watched_collectives(around: Callable[[Collective, Callable[[], Any]], Any]) -> Iterator[None]:
    """Passes each call through `around(call, run)`, which returns what the caller gets; `run()` makes the real call.

    Calls that an operation makes of another one, as `batch_isend_irecv` does, are not shown.
    """
    inside = threading.local()

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if getattr(inside, "running", False):
                return function(*args, **kwargs)
            inside.running = True
            try:
                return around(Collective.of(function, args, kwargs), lambda: function(*args, **kwargs))
            finally:
                inside.running = False

        return call

    with ExitStack() as stack:
        for name in OPERATIONS:
            spy = watched(getattr(dist, name))
            for module in (dist, distributed_c10d):  # the second one compares functions by identity
                stack.enter_context(mock.patch.object(module, name, spy))
        yield
