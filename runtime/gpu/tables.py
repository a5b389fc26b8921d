"""Measured tables of aiconfigurator-core: times of expert kernels and of NCCL, from the excerpt or from the package.

The excerpt in `measured/` holds the models that `shapes.py` names on the GPUs that `devices.py` names. Where the
package `aiconfigurator-core` is installed (the extra `gpu-tables`), all its shapes and precisions are read from its
files; it is not imported. See `measured/NOTICE`.

A row is one measurement of the most loaded GPU of an expert-parallel group: `tokens` are those of the whole group.
"""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.arrays import FloatArray

MEASURED = Path(__file__).parent / "measured"
ENGINES = ("vllm", "sglang", "trtllm")
RENAMED = {"kernel_source": "kernel", "moe_dtype": "precision", "inter_size": "intermediate_size", "topk": "top_k",
           "moe_ep_size": "ep_size", "num_tokens": "tokens", "latency": "milliseconds"}  # fmt: skip
TYPES = {
    "kernel": pa.string(), "precision": pa.string(), "hidden_size": pa.int32(), "intermediate_size": pa.int32(),
    "top_k": pa.int32(), "num_experts": pa.int32(), "ep_size": pa.int32(), "distribution": pa.string(),
    "tokens": pa.int32(), "milliseconds": pa.float32(),
}  # fmt: skip
DEEPEP_SMS = 20
"""Streaming multiprocessors that dispatch and combine take, of those that were measured."""
LINKS = ("all_gather", "reduce_scatter", "alltoall")


def package_folder() -> Path | None:
    """Folder of the whole tables; None where `aiconfigurator-core` is not installed."""
    found = find_spec("aiconfigurator_core")
    places = found.submodule_search_locations if found else None
    return Path(next(iter(places))) / "systems" / "data" if places else None


@cache
def kernel_rows(gpu: str, folder: Path | None = None) -> pa.Table:
    """All measurements of expert kernels on one GPU.

    Args:
        gpu: A name in `GPUS`.
        folder: Folder of the whole tables; None for the excerpt.
    """
    if folder is None:
        return pq.read_table(MEASURED / "kernels.parquet", filters=[("gpu", "=", gpu)])
    paths = [path for engine in ENGINES for path in (folder / gpu / "moe" / engine).glob("*/moe_perf.parquet")]
    return pa.concat_tables([_engine_rows(gpu, path) for path in sorted(paths)])


@cache
def link_rows(gpu: str, folder: Path | None = None) -> pa.Table:
    """All measurements of NCCL on one GPU: operation, num_gpus, bytes, milliseconds; `folder` as in `kernel_rows`."""
    if folder is None:
        return pq.read_table(MEASURED / "links.parquet", filters=[("gpu", "=", gpu)])
    path = max(
        (folder / gpu / "comm" / "nccl").glob("*/nccl_perf.parquet"), key=lambda path: version_order(path.parent.name)
    )
    rows = pq.read_table(path, filters=[("nccl_dtype", "=", "half"), ("op_name", "in", LINKS)])
    columns = {
        "gpu": pa.array([gpu] * len(rows)),
        "source": pa.array([f"NCCL {path.parent.name}"] * len(rows)),
        "operation": rows["op_name"].cast(pa.string()),
        "num_gpus": rows["num_gpus"].cast(pa.int16()),
        "bytes": pa.array(2 * rows["message_size"].to_numpy()),  # the table counts elements of two bytes
        "milliseconds": rows["latency"].cast(pa.float32()),
    }
    return pa.table(columns)


@cache
def dispatch_rows(gpu: str, folder: Path | None = None) -> pa.Table:
    """Measurements of DeepEP's dispatch and combine, added up: hidden_size, top_k, tokens of each GPU, milliseconds.

    Of the layers of one width and top-k, those with most experts; none where DeepEP was not measured on the GPU.
    """
    if folder is None:
        return pq.read_table(MEASURED / "dispatch.parquet", filters=[("gpu", "=", gpu)])
    paths = list((folder / gpu / "comm" / "sglang").glob("*/wideep_deepep_normal_perf.parquet"))
    path = max(paths, key=lambda path: version_order(path.parent.name))
    rows = pq.read_table(path, filters=[("dispatch_sms", "=", DEEPEP_SMS), ("combine_sms", "=", DEEPEP_SMS)])
    most: dict[tuple[int, int], int] = {}
    shapes = [rows[name].to_pylist() for name in ("hidden_size", "num_topk", "num_experts")]
    for hidden, top_k, experts in zip(*shapes, strict=True):
        most[hidden, top_k] = max(experts, most.get((hidden, top_k), 0))
    rows = rows.filter(pa.array([most[hidden, top_k] == n for hidden, top_k, n in zip(*shapes, strict=True)]))
    microseconds = column(rows, "dispatch_transmit_us") + column(rows, "combine_transmit_us")
    columns = {
        "gpu": pa.array([gpu] * len(rows)),
        "source": pa.array([f"DeepEP with sglang {path.parent.name}"] * len(rows)),
        "hidden_size": rows["hidden_size"].cast(pa.int32()),
        "top_k": rows["num_topk"].cast(pa.int32()),
        "tokens": rows["num_token"].cast(pa.int32()),
        "milliseconds": pa.array(1e-3 * microseconds, pa.float32()),
    }
    return pa.table(columns)


def version_order(version: str) -> list[int]:
    """The numbers in a version, so that 1.3.0rc20 comes after 1.3.0rc10."""
    return [int(number) for number in re.findall(r"\d+", version)]


def _engine_rows(gpu: str, path: Path) -> pa.Table:
    rows = pq.read_table(path, filters=[("moe_tp_size", "=", 1)])
    rows = rows.rename_columns([RENAMED.get(name, name) for name in rows.column_names])
    columns = {
        "gpu": pa.array([gpu] * len(rows)),
        "source": pa.array([f"{path.parts[-3]} {path.parent.name}"] * len(rows)),
    }
    columns |= {name: rows[name].cast(kind) for name, kind in TYPES.items()}
    return pa.table(columns)


def column(rows: pa.Table, name: str) -> FloatArray:
    """A column of numbers."""
    return np.asarray(rows[name].to_numpy(), np.float64)
