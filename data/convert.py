"""Reads load histories that other systems recorded into a trace of counts, so that the simulator can replay them.

Run it with `python -m data.convert LOADS --out outputs/traces/other`. LOADS is a counts array (.npy, or .npz with the
key `counts`), a file of SGLang's expert-distribution recorder (.pt; or a folder of them, one a rank), or a folder of
TensorRT-LLM's expert statistics.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open

from data.arrays import IntArray
from data.cli import from_command_line, user_errors
from data.files import read_json, whole_folder
from data.models.layout import MoELayout
from data.text.batching import time_splits
from data.traces.store import StoredTrace, open_trace, write_about, write_counts_shard

SHARD_STEPS = 1024


def read_loads(path: Path) -> IntArray:
    """Counts `[steps, layers, experts]` of a recording in any of the formats above.

    Raises:
        ValueError: If the file is none of them, damaged, or holds something that cannot be counts.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected counts, an SGLang recording, or a TensorRT-LLM folder")
    if path.is_dir():
        recordings = sorted(path.glob("*.pt"))
        counts = _sglang(recordings) if recordings else _tensorrt_llm(path)
    elif path.suffix in (".npy", ".npz"):
        counts = _numpy(path)
    elif path.suffix == ".pt":
        counts = _sglang([path])
    else:
        raise ValueError(f"{path} is none of .npy, .npz, .pt or a folder; convert your counts to one of them")
    return _checked(counts, path)


def _checked(counts: np.ndarray[Any, Any], path: Path) -> IntArray:
    if counts.ndim != 3 or 0 in counts.shape:
        raise ValueError(
            f"{path} holds counts of shape {counts.shape}, expected [steps, layers, experts], none of them 0"
        )
    if counts.dtype.kind not in "iuf" or not np.isfinite(counts).all() or (counts < 0).any() or (counts % 1).any():
        raise ValueError(f"{path} holds negative, fractional or non-finite entries; expected whole numbers of tokens")
    return counts.astype(np.int64)


def _numpy(path: Path) -> np.ndarray[Any, Any]:
    try:
        loaded = np.load(path, allow_pickle=False)
        counts: np.ndarray[Any, Any] = loaded["counts"] if path.suffix == ".npz" else loaded
    except KeyError:
        raise ValueError(f"{path} has the keys {loaded.files}, expected 'counts'") from None
    except Exception as error:  # zip, zlib and numpy each have their own for a damaged file
        raise ValueError(f"{path} cannot be read as numpy counts: {error}") from None
    return counts


def _sglang(files: list[Path]) -> np.ndarray[Any, Any]:
    """A recording of mode stat (`logical_count [steps, L, E]`) or, one file a rank, of mode per_pass."""
    documents = []
    for file in files:
        try:
            documents.append(torch.load(file, weights_only=True, map_location="cpu"))
        except Exception as error:  # torch, pickle and zip each have their own for a damaged file
            raise ValueError(f"{file} cannot be read as an SGLang recording: {str(error).splitlines()[0]}") from None
        keys = documents[-1].keys() if isinstance(documents[-1], dict) else set()
        if "logical_count" in keys:  # already summed over ranks
            return np.asarray(documents[-1]["logical_count"])
        if not {"records", "last_physical_to_logical_map"} <= keys:
            raise ValueError(
                f"{file} holds {sorted(keys)}, expected 'logical_count', or 'records' and the map of slots"
            )
    records = [record for document in documents for record in document["records"]]
    return _by_logical_expert(records, torch.as_tensor(documents[0]["last_physical_to_logical_map"]).long())


def _by_logical_expert(records: list[dict[str, Any]], phy2log_LP: torch.Tensor) -> np.ndarray[Any, Any]:
    """Counts of each forward pass `[N, L, E]`: slots of one expert summed, and so are ranks and gatherers.

    A rank counts its own tokens or its own slots, so the records of one pass complete each other.
    """
    num_experts = int(phy2log_LP.max()) + 1
    passes: dict[int, torch.Tensor] = {}
    for record in records:
        physical_LP = torch.as_tensor(record["global_physical_count"]).long()
        if physical_LP.shape != phy2log_LP.shape:
            raise ValueError(f"a record counts {tuple(physical_LP.shape)} slots, the map has {tuple(phy2log_LP.shape)}")
        logical_LE = torch.zeros(len(phy2log_LP), num_experts + 1, dtype=torch.int64)
        logical_LE.scatter_add_(1, phy2log_LP % (num_experts + 1), physical_LP)  # -1, an empty slot, goes last
        number = int(record["forward_pass_id"])
        passes[number] = passes.get(number, torch.zeros(())) + logical_LE[:, :num_experts]
    if not passes:
        raise ValueError("the recording holds no forward pass")
    return torch.stack([passes[number] for number in sorted(passes)]).numpy()


def _tensorrt_llm(folder: Path) -> np.ndarray[Any, Any]:
    """meta_info.json and rank*.safetensors whose keys are `{iteration}_{layer}`; ranks are summed."""
    files = sorted(folder.glob("rank*.safetensors"))
    meta = read_json(folder / "meta_info.json")
    if not files:
        raise ValueError(f"{folder} has no rank*.safetensors; expected TensorRT-LLM's expert statistics")
    sums: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    if not (match := re.fullmatch(r"(\d+)_(\d+)", key)):
                        raise ValueError(f"{file} has the key '{key}', expected '<iteration>_<layer>'")
                    place = int(match[1]), int(match[2])
                    sums[place] = sums.get(place, 0) + tensors.get_tensor(key).astype(np.int64).reshape(-1)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
    return _grid(sums, folder, meta.get("num_experts"))


def _grid(
    sums: dict[tuple[int, int], np.ndarray[Any, Any]], folder: Path, num_experts: int | None
) -> np.ndarray[Any, Any]:
    steps, layers = (sorted({place[axis] for place in sums}) for axis in (0, 1))
    if missing := [place for place in ((s, layer) for s in steps for layer in layers) if place not in sums]:
        raise ValueError(f"{folder} lacks iteration {missing[0][0]} of layer {missing[0][1]}")
    sizes = {len(row) for row in sums.values()} | ({num_experts} if num_experts else set())
    if len(sizes) != 1:
        raise ValueError(f"{folder} counts {sorted(sizes)} experts in different places; expected one number")
    return np.stack([np.stack([sums[step, layer] for layer in layers]) for step in steps])


def convert(loads: Path, out: Path = Path("outputs/traces/converted"), model_id: str = "") -> StoredTrace:
    """Converts a recorded load history into a trace of counts.

    Args:
        loads: Counts array, SGLang recording, or TensorRT-LLM folder.
        out: Folder of the trace; it appears whole or not at all.
        model_id: Name of the model for people; the name of the recording by default.

    Raises:
        ValueError: If the recording cannot be read or the folder exists.
    """
    counts = read_loads(loads)
    steps, layers, experts = counts.shape
    layout = MoELayout(
        model_id or loads.stem, "", tuple(("decoder", layer) for layer in range(layers)), experts,
        expert_capacity=0, d_model=0, d_ff=0, vocab_size=0,
    )  # fmt: skip
    with whole_folder(out) as aside:
        shards = [
            write_counts_shard(aside / f"part-{index:05d}.parquet", first, counts[first : first + SHARD_STEPS])
            for index, first in enumerate(range(0, steps, SHARD_STEPS))
        ]
        write_about(aside, layout, shards, time_splits(steps), "counts", text=loads.name)
    return open_trace(out)


def main() -> None:
    """Command line of `convert`; the last line of stdout is one JSON document."""
    with user_errors():
        trace = from_command_line(convert)
        layout = trace.layout
        Console(stderr=True).print(f"Wrote {trace.path}; look at it with `python -m data.show {trace.path}`")
        shape = [trace.num_batches, layout.num_layers, layout.num_experts]
        print(json.dumps({"trace": str(trace.path), "shape": shape}))


if __name__ == "__main__":
    main()
