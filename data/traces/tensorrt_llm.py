"""TensorRT-LLM's expert statistics: `meta_info.json` and a safetensors file for each rank, as counts `[steps, L, E]`.

The keys of a file are `{iteration}_{layer}`, its values counts `[E]`.
"""

import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from data.arrays import FloatArray
from data.files import read_json
from data.traces.loads import check_counts


def read_statistics(folder: Path, files: list[Path]) -> FloatArray:
    """Counts `[steps, L, E]`, summed over the files of the ranks.

    Raises:
        ValueError: If a file is damaged, lacks an iteration of a layer, or does not fit the others.
    """
    meta = read_json(folder / "meta_info.json")
    sums: dict[tuple[int, int], FloatArray] = {}
    for file in files:
        try:
            tensors = load_file(file)
        except Exception as error:  # safetensors raises several kinds on a damaged file
            raise ValueError(f"{file} cannot be read: {error}") from None
        for key, counts in tensors.items():
            if not (match := re.fullmatch(r"(\d+)_(\d+)", key)):
                raise ValueError(f"{file} has the key '{key}', expected '<iteration>_<layer>'")
            place = (int(match[1]), int(match[2]))
            row = check_counts(counts, file).astype(np.float64).reshape(-1)
            if len(row) != len(sums.setdefault(place, np.zeros_like(row))):
                raise ValueError(f"{file} counts {len(row)} experts in '{key}', another rank {len(sums[place])}")
            sums[place] += row
    steps, layers = (sorted({place[axis] for place in sums}) for axis in (0, 1))
    if missing := [place for place in ((step, layer) for step in steps for layer in layers) if place not in sums]:
        raise ValueError(f"{folder} lacks iteration {missing[0][0]} of layer {missing[0][1]}")
    if len(sizes := sorted({len(row) for row in sums.values()})) != 1:
        raise ValueError(f"{folder} counts {sizes} experts in different places; expected one number")
    if meta.get("num_experts", sizes[0]) != sizes[0]:
        raise ValueError(f"{folder} counts {sizes[0]} experts, its meta_info.json names {meta['num_experts']}")
    return np.stack([np.stack([sums[step, layer] for layer in layers]) for step in steps])
