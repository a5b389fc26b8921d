"""Recorded expert loads of any supported format, read into one array `[steps, L, E]`; shares and their distance.

| recording | files |
|---|---|
| trace | folder that `python -m data.collect` wrote (or `data.convert`, with counts alone) |
| numpy | `.npy`, or `.npz` with the key `counts`, `[steps, L, E]` |
| SGLang's expert-distribution recorder | `.pt`, or a folder of them ([sglang.py](sglang.py)) |
| TensorRT-LLM's statistics | folder of `meta_info.json`, `rank*.safetensors` ([tensorrt_llm.py](tensorrt_llm.py)) |
| vLLM's routed experts | `.npz` with the key `routed_experts`, or `*routed_experts.npy`, ids `[tokens, L, K]` |
| Megatron's router trace | `.jsonl`, or a folder of them with one file for each rank |

vLLM does not record steps: its tokens are counted in steps of 512. Steps in which no expert got a token (the unused end
of a buffer, idle passes) are no load; they are counted, left out, and logged.

Importing this module loads numpy alone: torch, pyarrow and safetensors are imported by the readers that need them.
Shape suffixes: T tokens, K experts of a token, L MoE layers, E logical experts.
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.arrays import MOST_EXPERTS, FloatArray, IntArray
from data.traces.numpy_file import array_names, read_arrays
from data.traces.recordings import DUMPS, PARTS, ROUTER_TRACES, STATISTICS, TRACE_JSON

if TYPE_CHECKING:
    from data.models.layout import MoELayout
    from data.traces.trace import TokenBatch

KEY, ROUTED = "counts", "routed_experts"
FORMATS = (
    "a trace folder, .npy or .npz counts or routed_experts, a Megatron router trace (.jsonl), an SGLang recording "
    "(.pt), or a TensorRT-LLM folder"
)
STEP_TOKENS = 512
"""Tokens of a step where a recording has no steps."""
MOST_TOKENS = 2**53
"""Up to here float64, in which counts are summed, is exact."""
FEWEST_ROWS, MOST_OF_TOKEN = 256, 16
"""Rows from which an array is examined for ids in place of counts, and most experts of a token in such a row."""
Counts = np.ndarray[Any, Any]
"""Counts as a file holds them, not checked yet."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedLoads:
    """Loads in the order in which the batches ran.

    Attributes:
        name: Path of the recording.
        loads: Tokens of each expert, `[steps, L, E]`; every step has some.
        batches: What is known of the input tokens of each step before it runs; None where only counts were recorded.
        layout: The model's layout; None where only counts were recorded.
        sequences: Loads of each sequence, `[steps][B, L, E]`; None unless requests were served.
        empty_steps: Steps without tokens, which were left out.
    """

    name: str
    loads: IntArray
    batches: "list[TokenBatch] | None" = None
    layout: "MoELayout | None" = None
    sequences: "list[Counts] | None" = None
    empty_steps: int = 0

    @property
    def layers(self) -> IntArray:
        """Numbers of the layers that got tokens in some step; dense layers, and those that did not run, got none."""
        return np.flatnonzero(self.loads.any((0, 2)))

    def with_tokens(self) -> "RecordedLoads":
        """The same without the steps in which no expert got a token; what is left out is logged.

        Raises:
            ValueError: If no step has tokens.
        """
        kept, steps = np.flatnonzero(self.loads.any((1, 2))), len(self.loads)
        log_empty(self.name, steps, empty := steps - len(kept))
        if not empty:
            return self
        return replace(
            self,
            loads=self.loads[kept],
            batches=None if self.batches is None else [self.batches[step] for step in kept],
            sequences=None if self.sequences is None else [self.sequences[step] for step in kept],
            empty_steps=self.empty_steps + empty,
        )


def log_empty(name: str, steps: int, empty: int) -> None:
    """Logs how many of a recording's steps hold no tokens, if any.

    Raises:
        ValueError: If none holds tokens.
    """
    if empty == steps:
        raise ValueError(f"{name} holds no tokens in any of its {steps} steps; expected counts of tokens")
    if empty:
        log.warning("%s: %d of %d steps hold no tokens and are left out", name, empty, steps)


def read_loads(path: Path, num_experts: int | None = None) -> RecordedLoads:
    """Reads a recording of any format in the table above, without the steps that hold no tokens.

    Args:
        path: The recording.
        num_experts: Experts of a layer, where ids were recorded; by default one more than the largest id.

    Raises:
        ValueError: If the path is no recording, or the recording is damaged or holds something other than counts.
    """
    return _read(path, num_experts).with_tokens()


def _read(path: Path, num_experts: int | None) -> RecordedLoads:
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected {FORMATS}")
    if path.is_dir():
        return _read_folder(path, num_experts)
    if path.suffix in (".npy", ".npz"):
        return RecordedLoads(str(path), check_loads(_numpy(path, num_experts), path))
    if path.suffix == ".jsonl":
        return RecordedLoads(str(path), _megatron([path], num_experts))
    if path.suffix == ".pt":
        return RecordedLoads(str(path), _sglang(path, [path]))
    raise ValueError(f"{path} is not a recording; expected {FORMATS}")


def check_loads(array: Counts, path: Path) -> IntArray:
    """Converts counts to int64; refuses anything but whole tokens `[steps, L, E]`.

    Raises:
        ValueError: Naming the file, what it holds, and what was expected.
    """
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"{path} has shape {array.shape}, expected [steps, layers, experts], at least one of each")
    return check_counts(array, path).astype(np.int64)


def check_counts(array: Counts, path: Path) -> Counts:
    """Refuses anything but whole tokens, in an array of any shape, such as one rank's part of a sum.

    Raises:
        ValueError: Naming the file, what it holds, and what was expected.
    """
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{path} holds {array.dtype}, expected counts of tokens")
    if array.dtype.kind == "f" and (odd := array[~np.isfinite(array) | (array != np.round(array))]).size:
        raise ValueError(f"{path} holds figures that are not whole numbers, such as {odd[0]}; expected tokens")
    if array.min(initial=0) < 0:
        raise ValueError(f"{path} holds {array.min()}; tokens cannot be negative")
    if float(array.max(initial=0)) > MOST_TOKENS:  # which float16 cannot hold
        raise ValueError(f"{path} holds {array.max()}; expected counts of tokens, at most {MOST_TOKENS}")
    return array


def share_of(load: IntArray | FloatArray) -> FloatArray:
    """Loads `[..., E]` divided by their sum over experts: [1, 3] becomes [.25, .75]; no load at all, uniform shares."""
    total = load.sum(-1, keepdims=True)
    uniform = np.full(load.shape, 1.0 / load.shape[-1])
    share: FloatArray = np.divide(load, total, out=uniform, where=total > 0)
    return share


def total_variation(share: FloatArray, other: FloatArray) -> FloatArray:
    """Total variation distance (0 to 1) of shares `[..., E]`: the part of the tokens that changed experts, `[...]`.

    From [.25, .75] to [.5, .5], a quarter of the tokens moved from the second expert to the first: .25.
    """
    return np.asarray(np.abs(share - other).sum(-1) / 2)


def _read_folder(folder: Path, num_experts: int | None) -> RecordedLoads:
    if (folder / TRACE_JSON).exists():
        from data.traces.store import open_trace

        trace = open_trace(folder)
        loads = check_loads(trace.loads(), folder)
        if trace.about["granularity"] == "counts":  # its layout knows the number of experts, not their size
            return RecordedLoads(str(folder), loads)
        return RecordedLoads(str(folder), loads, list(trace.batches()), trace.layout)
    if recordings := sorted(folder.glob(DUMPS)):
        return RecordedLoads(str(folder), _sglang(folder, recordings))
    if files := sorted(folder.glob(STATISTICS)):
        from data.traces.tensorrt_llm import read_statistics

        return RecordedLoads(str(folder), check_loads(read_statistics(folder, files), folder))
    if files := sorted(folder.glob(ROUTER_TRACES)):
        return RecordedLoads(str(folder), _megatron(files, num_experts))
    raise ValueError(f"{folder} has no {', no '.join(PARTS[:-1])} and no {PARTS[-1]}; expected {FORMATS}")


def _numpy(path: Path, num_experts: int | None) -> Counts:
    routed, names = path.stem.endswith(ROUTED), array_names(path)
    if path.suffix == ".npz" and names:
        routed = ROUTED in names
        if KEY not in names and not routed:
            hint = "; `python -m data.convert` makes a trace of requests token by token" if "tokens" in names else ""
            raise ValueError(f"{path} holds {sorted(names)}, expected the key '{KEY}' or '{ROUTED}'{hint}")
        names = [ROUTED if routed else KEY]
    (array,) = read_arrays(path, names or None).values()
    if routed:
        return _vllm(path, array, num_experts)
    if path.suffix == ".npy":
        _refuse_ids(path, array)
    return array


def _sglang(path: Path, files: list[Path]) -> IntArray:
    from data.traces.sglang import read_sglang

    return check_loads(read_sglang(path, files), path)


def _refuse_ids(path: Path, array: Counts) -> None:
    """Refuses what is most likely ids `[tokens, L, K]`, in a file that does not say what it holds.

    The experts of a token differ from one another in every row, and their sums from layer to layer. Counts of hundreds
    of steps repeat a number in some row, and most models compute as many tokens in each layer.

    Raises:
        ValueError: If so.
    """
    if array.ndim != 3 or array.dtype.kind not in "iu" or not 1 < array.shape[-1] <= MOST_OF_TOKEN:
        return
    array = _varying(array)
    rows, sums = array.reshape(-1, array.shape[-1]), array.sum(-1, dtype=np.float64)
    if len(rows) < FEWEST_ROWS or array.shape[1] < 2 or not (np.diff(np.sort(rows)) != 0).all():
        return
    if (sums != sums[:, :1]).any(1).mean() > 0.5:
        raise ValueError(
            f"{path} looks like expert ids [tokens, layers, experts of a token]: the {array.shape[-1]} numbers of a "
            f"row always differ, and their sums from layer to layer; name it {path.stem}.{ROUTED}.npy if it is, or "
            f"save counts as .npz under the key '{KEY}'"
        )


def _vllm(path: Path, routed_TLK: Counts, num_experts: int | None) -> Counts:
    """Counts of expert ids; layers without experts, which hold one id everywhere, are left out."""
    if routed_TLK.ndim != 3 or routed_TLK.dtype.kind not in "iu" or 0 in routed_TLK.shape:
        raise ValueError(
            f"{path} holds {routed_TLK.dtype} {routed_TLK.shape}, expected expert ids [tokens, layers, experts of a "
            "token]"
        )
    routed_TLK = _varying(routed_TLK)
    if not routed_TLK.size:
        raise ValueError(f"{path} holds one expert id in all layers; expected the experts of each token")
    starts = range(0, len(routed_TLK), STEP_TOKENS)
    steps = [routed_TLK[start : start + STEP_TOKENS] for start in starts]
    size = _experts_of([(path, routed_TLK)], num_experts)
    return np.stack([_count_ids(step.transpose(1, 0, 2), size) for step in steps])


def _varying(array: Counts) -> Counts:
    """The layers of `[steps, L, ...]` that do not hold one number everywhere, as dense layers do."""
    layers = [layer for layer in range(array.shape[1]) if array[:, layer].size and np.ptp(array[:, layer]) > 0]
    return array[:, layers]


def _experts_of(ids: "list[tuple[Path, Counts]]", num_experts: int | None) -> int:
    """Experts of a layer, as given or one more than the largest id.

    Args:
        ids: Arrays of ids, each with its file.
        num_experts: E, if the user gave it.

    Raises:
        ValueError: If an id is negative, or not below the number given.
    """
    if num_experts is not None and not 1 <= num_experts <= MOST_EXPERTS:
        raise ValueError(f"num_experts is {num_experts}, expected 1 to {MOST_EXPERTS}")
    for path, array in ids:
        for found in (int(array.min()), int(array.max())):
            if not 0 <= found < (num_experts or MOST_EXPERTS):
                raise ValueError(f"{path} holds expert {found}, expected 0 to {(num_experts or MOST_EXPERTS) - 1}")
    return num_experts or 1 + max(int(array.max()) for _, array in ids)


def _count_ids(ids: Counts, num_experts: int) -> IntArray:
    """Counts `[L, E]` of expert ids `[L, ...]`."""
    return np.stack([np.bincount(layer.reshape(-1), minlength=num_experts) for layer in ids])


def _megatron(files: list[Path], num_experts: int | None) -> IntArray:
    """Counts of records with the ids `top_indices [tokens, K]` of one step and layer, summed over ranks.

    Layers of block "mtp" follow those of block "decoder". Where records of several stages stand side by side, those of
    the stage that comes first count. A rank without tokens in a step has an empty list there.
    """
    found: dict[tuple[int, tuple[str, int, int]], list[tuple[Path, Counts]]] = {}
    stage = None
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not a router trace of Megatron: {error}") from None
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                place = (str(record.get("block", "decoder")), int(record.get("mtp_idx", 0)), int(record["layer"]))
                step, ids = int(record["step"]), np.asarray(record["top_indices"])
                stage = record.get("stage") if stage is None else stage
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                raise ValueError(f"{file}, line {number} is not a record of Megatron's router trace: {error}") from None
            if not ids.size:
                ids = np.zeros((0, 1), dtype=np.int64)
            if ids.ndim != 2 or ids.dtype.kind not in "iu":
                raise ValueError(
                    f"{file}, line {number}: top_indices has shape {ids.shape}, expected ids [tokens, topk]"
                )
            if record.get("stage") == stage:
                found.setdefault((step, place), []).append((file, ids))
    known = [one for group in found.values() for one in group if one[1].size]
    if not known:
        raise ValueError(f"{files[0]} holds no record with tokens; expected one JSON document a line")
    steps, layers = sorted({step for step, _ in found}), sorted({place for _, place in found})
    if missing := [(step, place) for step in steps for place in layers if (step, place) not in found]:
        raise ValueError(f"{files[0].parent} lacks step {missing[0][0]} of layer {missing[0][1][2]}")
    size = _experts_of(known, num_experts)
    rows = ([ids.reshape(-1) for _, ids in found[step, place]] for step in steps for place in layers)
    counts = np.stack([np.bincount(np.concatenate(ids), minlength=size) for ids in rows])
    return counts.reshape(len(steps), len(layers), size)
