"""Recorded loads to replay: a trace folder, or the counts alone as .npy or .npz.

Shape suffixes: L MoE layers, E logical experts.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.arrays import IntArray
from data.models.layout import MoELayout
from data.traces.trace import TokenBatch

KEY = "counts"


@dataclass(frozen=True)
class RecordedLoads:
    """Loads in the order they came.

    Attributes:
        name: Where they come from.
        loads: Tokens of each expert, `[steps, L, E]`.
        batches: Encoder tokens of each step; None where only counts were recorded.
        layout: The model; None where only counts were recorded.
    """

    name: str
    loads: IntArray
    batches: list[TokenBatch] | None = None
    layout: MoELayout | None = None


def read_loads(path: Path) -> RecordedLoads:
    """Reads recorded loads.

    Raises:
        ValueError: Naming the file and what is wrong with it.
    """
    if path.is_dir():
        from data.traces.store import open_trace  # only here: counts alone need no pyarrow

        trace = open_trace(path)
        return RecordedLoads(str(path), check_loads(trace.loads(), path), list(trace.batches()), trace.layout)
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a trace folder, or a .npy or .npz file of counts")
    try:
        array = np.load(path)
        if isinstance(array, np.lib.npyio.NpzFile):
            with array:
                if KEY not in array:
                    raise ValueError(f"it holds {sorted(array)}, expected the key '{KEY}'")
                array = array[KEY]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as loads: {error}") from None
    return RecordedLoads(str(path), check_loads(array, path))


def check_loads(array: IntArray, path: Path) -> IntArray:
    """The loads as int64, refused unless they are `[steps, L, E]` whole tokens.

    Raises:
        ValueError: Naming what was found and what was expected.
    """
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"{path} has shape {array.shape}, expected [steps, layers, experts], at least one of each")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{path} holds {array.dtype}, expected counts of tokens")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.round(array)).all()):
        raise ValueError(f"{path} holds figures that are not whole numbers; expected counts of tokens")
    if array.min() < 0:
        raise ValueError(f"{path} holds {array.min()}; tokens cannot be negative")
    return array.astype(np.int64)
