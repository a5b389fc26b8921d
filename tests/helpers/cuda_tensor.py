"""CudaTensor: a tensor that says it is on a CUDA device and holds real data on the host.

Every operator reaches `dispatch`, which refuses what CUDA would refuse, counts what a GPU would do, and runs the
operator on the data. Wrappers and data are made outside inference mode: a view of a normal tensor made inside it would
be refused ("Cannot set version_counter for inference tensor").
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import cuda_rules as rules
from tests.helpers.cuda_requests import COUNTS, DOWNLOAD, KERNEL, PAGEABLE_UPLOAD, PIN, SYNC, UPLOAD
from tests.helpers.cuda_streams import device_index

Operator = Any
COMPOSITE = "CompositeImplicitAutograd"
"""Key of the kernels that only call other operators."""


class CudaTensor(torch.Tensor):
    """Wraps data on the host.

    Attributes:
        inner: The data.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, index: int) -> "CudaTensor":
        wrapper: CudaTensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=torch.device("cuda", index),
        )  # fmt: skip
        wrapper.inner = inner
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Operator, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: "CudaTensor") -> None:
        assert isinstance(other, CudaTensor), "data of a CUDA tensor replaced by data on the host"
        assert (other.shape, other.stride()) == (self.shape, self.stride()), (
            "data of another shape or with other strides"
        )
        self.inner = other.inner

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def record_stream(self, stream: Any) -> None:
        """Memory is never given to another tensor while CUDA is pretended."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "CudaTensor":
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        copy.__dict__ |= {name: value for name, value in self.__dict__.items() if name != "inner"}
        memo[id(self)] = copy
        return copy

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else super().__format__(spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"CudaTensor({self.inner!r}, {self.device})"


class CudaMode(TorchDispatchMode):
    """Sees operators without any `CudaTensor`, such as uploads and factories; each thread needs its own."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch.compile's machinery is imported, which takes seconds

    def __torch_dispatch__(
        self, func: Operator, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


class Observer(Protocol):
    """Receives every operator that has run, on the host or on a device; see `tests.helpers.races`."""

    def saw(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None: ...


OBSERVERS: list[Observer] = []
_pinned: dict[int, Any] = {}
_registered: dict[int, int] = {}


def pin(tensor: Tensor) -> Tensor:
    """Makes a host tensor's storage pinned; it stays allocated until `unpin_all`."""
    COUNTS.add(PIN, "pinned memory")
    _pinned[tensor.untyped_storage().data_ptr()] = tensor
    return tensor


def register(start: int, nbytes: int) -> None:
    """Makes a byte range of host memory pinned, as `cudaHostRegister` does."""
    COUNTS.add(PIN, "cudaHostRegister")
    _registered[start] = start + nbytes


def unregister(start: int) -> None:
    """Makes a registered range pageable again."""
    del _registered[start]


def unpin_all() -> None:
    """Makes all memory pageable again."""
    _pinned.clear()
    _registered.clear()


def is_pinned(tensor: Tensor) -> bool:
    """Whether a host tensor lies in pinned memory."""
    if tensor.untyped_storage().data_ptr() in _pinned:
        return True
    place = tensor.data_ptr()
    return any(start <= place < stop for start, stop in list(_registered.items()))


def _leaves(tree: Any) -> list[Any]:
    """The values in nested lists, tuples and dictionaries; torch's own function for it takes most of a test's time."""
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return [tree]
    return [leaf for branch in tree for leaf in _leaves(branch)]


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """The same nesting with each value changed."""
    if isinstance(tree, dict):
        return {name: _mapped(change, branch) for name, branch in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(change, branch) for branch in tree)
    return change(tree)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Tensors made inside are no inference tensors and record no gradients."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def dispatch(func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operator as a CUDA build would."""
    leaves = _leaves((args, kwargs))
    on_cuda = [leaf for leaf in leaves if isinstance(leaf, CudaTensor)]
    device = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    name = func._schema.name.split("::")[1]
    if name in ("is_pinned", "pin_memory", "_pin_memory"):
        return is_pinned(args[0]) if name == "is_pinned" else _pin_copy(args[0])
    if not on_cuda and (device is None or device.type != "cuda"):
        return _on_host(func, args, kwargs)
    if torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
        with ordinary_tensors(), CudaMode():  # inside inference mode these arrive whole
            return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
    with ordinary_tensors():
        return _on_device(func, name, args, kwargs, on_cuda, leaves, device)


def _on_host(func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    output = func(*args, **{name: value for name, value in kwargs.items() if name != "pin_memory"})
    if kwargs.get("pin_memory"):
        pin(output)
    for observer in OBSERVERS:
        observer.saw(func, args, kwargs, output)
    return output


def _pin_copy(tensor: Tensor) -> Tensor:
    with ordinary_tensors():
        return pin(tensor.clone(memory_format=torch.contiguous_format))


def _on_device(
    func: Operator,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    on_cuda: Sequence[CudaTensor],
    leaves: Sequence[Any],
    device: torch.device | None,
) -> Any:
    _refuse(name, args, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
    to_host = device is not None and device.type == "cpu"
    index = device_index(device) if device is not None and not to_host else device_index(_device_of(on_cuda))
    _count(func, name, args, kwargs, to_host)
    inner_args, inner_kwargs = _unwrapped((args, kwargs))
    output = func(*inner_args, **inner_kwargs)
    if to_host and kwargs.get("non_blocking"):  # torch gives such a copy a pinned target
        pin(output)
    if not to_host:
        output = _wrapped(func, leaves, output, index)
    for observer in OBSERVERS:
        observer.saw(func, args, kwargs, output)
    return output


def _device_of(on_cuda: Sequence[CudaTensor]) -> torch.device | None:
    return on_cuda[0].device if on_cuda else None


def _refuse(name: str, args: tuple[Any, ...], tensors: Sequence[Tensor]) -> None:
    rules.refuse_mixed_devices(name, tensors)
    if name.startswith(("index_put", "_index_put")):
        rules.refuse_foreign_indices(args[0], args[1], args[2])
    elif name == "index":
        rules.refuse_foreign_indices(args[0], args[1])


def _unwrapped(tree: Any) -> Any:
    """Arguments for the host: data for wrappers, the host for devices, and nothing asynchronous."""

    def unwrap(leaf: Any) -> Any:
        if isinstance(leaf, CudaTensor):
            return leaf.inner
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    args, kwargs = _mapped(unwrap, tree)
    return args, {name: value for name, value in kwargs.items() if name not in ("non_blocking", "pin_memory")}


def _wrapped(func: Operator, leaves: Sequence[Any], output: Any, index: int) -> Any:
    """The operator's output for the caller: an argument that was written to is returned itself."""
    known = {id(_data(leaf)): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    for leaf in known.values():
        if leaf.shape != _data(leaf).shape:
            raise NotImplementedError(f"{func} changes the shape of a tensor in place; pretended tensors keep theirs")

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else CudaTensor(leaf, index)

    return _mapped(wrap, output)


def _data(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, CudaTensor) else tensor


def _count(func: Operator, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], to_host: bool) -> None:
    """Counts what the operator asks of the device and of the host."""
    if name in ("_to_copy", "copy_"):
        _count_copy(name, args, kwargs, to_host)
    elif name == "_grouped_mm":
        ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
        rules.check_grouped_mm(args[0].inner, args[1].inner, None if ends is None else ends.inner)
    elif name not in rules.VIEWS and not func.namespace.startswith(("prim", "c10d")):
        COUNTS.add(KERNEL, name, rules.KERNELS.get(name, 1))
    if name in rules.SYNCING and "output_size" not in kwargs:
        COUNTS.add(SYNC, name)
        COUNTS.add(DOWNLOAD, name)
    if name == "index" or name.startswith(("index_put", "_index_put")):
        for index in args[1]:
            if index is not None and not index.is_cuda:
                COUNTS.add(PAGEABLE_UPLOAD, f"{name} with an index on the host")
                COUNTS.add(SYNC, f"{name} with an index on the host")
            elif index is not None and index.dtype in (torch.bool, torch.uint8):
                COUNTS.add(SYNC, f"{name} with a mask")


def _count_copy(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], to_host: bool) -> None:
    source = args[0] if name == "_to_copy" else args[1]
    onto_cuda = args[0].is_cuda if name == "copy_" else not to_host
    later = bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
    if source.is_cuda and onto_cuda:
        COUNTS.add(KERNEL, name)
        return
    if onto_cuda:
        pinned = is_pinned(source)
        COUNTS.add(UPLOAD if pinned else PAGEABLE_UPLOAD, name)
    else:
        pinned = name == "_to_copy" or is_pinned(args[0])
        COUNTS.add(DOWNLOAD, name)
    if not (later and pinned):
        COUNTS.add(SYNC, f"{UPLOAD if onto_cuda else DOWNLOAD} by {name}")
