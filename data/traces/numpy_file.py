"""Arrays of .npy and .npz files from outside: no pickles, no archives that grow without bound."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import first_line

Arrays = dict[str, np.ndarray[Any, Any]]
MOST_GROWTH, ALWAYS_TAKEN = 200, 256 << 20
"""Times that an archive's arrays may be larger than the archive, and bytes of arrays up to which that is not asked."""


def array_names(path: Path) -> list[str]:
    """Names of the arrays in an .npz file; none of a file that is damaged or something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile):
        return []


def read_arrays(path: Path, names: list[str] | None = None) -> Arrays:
    """Reads an .npz file, or the array of an .npy file under an empty name.

    Args:
        path: The file.
        names: The arrays to read; by default all of them.

    Raises:
        ValueError: If it is damaged, lacks an array, holds objects, or would grow beyond measure.
    """
    try:
        _check_growth(path)
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"": found}
        with found:
            arrays = {name: found[name] for name in (found.files if names is None else names)}
    except Exception as error:  # zip, zlib and numpy each raise their own on a damaged file
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from None
    if wrong := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise ValueError(f"{path} holds '{wrong[0]}', which is no array")
    return arrays


def _check_growth(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > ALWAYS_TAKEN and size > MOST_GROWTH * path.stat().st_size:
        raise ValueError(f"its arrays would take {size:,} bytes, more than {MOST_GROWTH} times the file; save it anew")
