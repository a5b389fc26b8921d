"""SGLang's recordings of expert distribution, one file or a folder of them, as counts `[steps, L, E]`.

| mode of the recorder | a file holds | files |
|---|---|---|
| stat | `logical_count [steps, L, E]`, summed over ranks | one for each recording |
| per_pass | records with `global_physical_count [L, P]` | one for each recording and rank |
| per_token | records with `topk_ids_of_layer [L, T, K]`, slots, -1 where there is none | likewise |

The recordings of a folder follow one another in order of the times in their names. The records of one forward pass are
summed over ranks, as SGLang sums them itself: each rank is taken to record its own tokens, or its own slots. Under pure
tensor parallelism every rank records all tokens; shares are then right, and loads are too large by the number of ranks.
Slots are assigned to experts by the map at the end of each recording; a map that changed before is not in the file.

Shape suffixes: T tokens, K experts of a token, L layers, E logical experts, P physical slots.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.arrays import MOST_EXPERTS, IntArray
from data.errors import first_line
from data.traces.loads import Counts, check_counts

RING = 1000
"""Steps that the recorder of mode stat keeps unless told otherwise; later steps overwrite the oldest."""
STAT, COUNT, IDS, MAP = "logical_count", "global_physical_count", "topk_ids_of_layer", "last_physical_to_logical_map"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dump:
    """One file: of mode stat the counts `[steps, L, E]`, else the records and the map `[L, P]` of slots to experts."""

    path: Path
    rank: int
    counts: Counts | None
    records: list[dict[str, Any]]
    phy2log: IntArray


def read_sglang(path: Path, files: list[Path]) -> Counts:
    """Counts of all recordings in the files, in order of time.

    Args:
        path: The file or folder, for messages.
        files: The files.

    Raises:
        ValueError: If a file is damaged, or the files do not say which of them belong together, and in which order.
    """
    dumps = [_dump(file) for file in files]
    if len({dump.counts is None for dump in dumps}) > 1:
        raise ValueError(f"{path} holds recordings of mode stat beside others; give each mode a folder of its own")
    parts = [_stat(group) if group[0].counts is not None else _passes(group) for group in _recordings(path, dumps)]
    if len(shapes := sorted({part.shape[1:] for part in parts})) > 1:
        raise ValueError(f"{path} holds recordings of {shapes} layers and experts; expected one model")
    return np.concatenate(parts)


def _dump(file: Path) -> Dump:
    import torch

    try:
        document = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # torch, pickle and zip each raise their own on a damaged file
        raise ValueError(f"{file} cannot be read as an SGLang recording: {first_line(error)}") from None
    keys = document.keys() if isinstance(document, dict) else set()
    if not (STAT in keys or {"records", MAP} <= keys):
        found = sorted(map(str, keys))
        raise ValueError(f"{file} holds {found}, expected '{STAT}', or 'records' and the map of slots")
    try:
        if STAT in keys:
            counts = check_counts(stored_array(document[STAT]), file)
            if counts.ndim != 3:
                raise ValueError(f"{STAT} has shape {counts.shape}, expected [steps, layers, experts]")
            return Dump(file, int(document.get("rank", 0)), counts, [], np.zeros((0, 0), dtype=np.int64))
        records = document["records"]
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError("'records' is no list of records")
        ranks = {int(record.get("rank", 0)) for record in records}
        return Dump(file, min(ranks, default=_rank_named(file)), None, records, _map(stored_array(document[MAP])))
    except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
        raise _unlike(file, error) from None


def _unlike(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is not laid out as an SGLang recording: {error}")


def stored_array(value: Any) -> Counts:
    """A tensor as an array; floats of any width become float64.

    Raises:
        ValueError: If it is larger than what is stored for it, or not stored entry by entry.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        raise ValueError(f"a tensor has layout {value.layout} on {value.device}, expected one stored entry by entry")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"a tensor {tuple(value.shape)} is stored in {value.untyped_storage().nbytes()} bytes")
    value = value.detach()
    return np.asarray(value.double() if value.is_floating_point() else value)


def _map(phy2log_LP: Counts) -> IntArray:
    """The expert of each slot, -1 for an empty one."""
    if phy2log_LP.ndim != 2 or phy2log_LP.dtype.kind not in "iu" or 0 in phy2log_LP.shape:
        raise ValueError(f"the map of slots is {phy2log_LP.dtype} {phy2log_LP.shape}, expected experts [layers, slots]")
    for found in (int(phy2log_LP.min()), int(phy2log_LP.max())):
        if not -1 <= found < MOST_EXPERTS:
            raise ValueError(f"the map of slots holds expert {found}, expected -1 (empty) to {MOST_EXPERTS - 1}")
    return phy2log_LP.astype(np.int64)


def _time_named(file: Path) -> float | None:
    """The time in a name such as expert_distribution_recorder_1700000000.25_0.pt, which ends with the rank."""
    match = re.search(r"_(\d+(?:\.\d+)?)(?:_\d+)?$", file.stem)
    return float(match[1]) if match else None


def _rank_named(file: Path) -> int:
    match = re.search(r"_\d+(?:\.\d+)?_(\d+)$", file.stem)
    return int(match[1]) if match else 0


def _recordings(path: Path, dumps: list[Dump]) -> Iterator[tuple[Dump, ...]]:
    """The files of each recording, one for each rank; recordings in order of time."""
    of_rank: dict[int, list[Dump]] = {}
    for dump in dumps:
        of_rank.setdefault(dump.rank, []).append(dump)
    sizes = {rank: len(own) for rank, own in of_rank.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"{path} holds {sizes} files by rank, expected as many of each; give each recording a folder of its own"
        )
    for own in of_rank.values():
        if len(own) > 1 and (unnamed := [dump.path.name for dump in own if _time_named(dump.path) is None]):
            raise ValueError(
                f"{path} holds several recordings, and {unnamed[0]} does not say its time; expected names such as "
                "expert_distribution_recorder_<time>_<rank>.pt"
            )
        own.sort(key=lambda dump: _time_named(dump.path) or 0.0)
    return zip(*of_rank.values(), strict=True)


def _stat(recording: tuple[Dump, ...]) -> Counts:
    """Counts that SGLang has summed over ranks; says so if its ring buffer may have overwritten the first steps."""
    first, *more = recording
    if more:
        raise ValueError(f"{first.path} and {more[0].path.name} both hold sums over all ranks; keep one of them")
    counts = first.counts
    assert counts is not None
    if len(counts) == RING and counts[0].any() and counts[-1].any():
        log.warning(
            "%s holds %d steps, as many as SGLang keeps by default: if more ran, the oldest are lost, and the first "
            "step here is not the oldest; record with a larger --expert-distribution-recorder-buffer-size",
            first.path, RING,
        )  # fmt: skip
    return counts


def _passes(recording: tuple[Dump, ...]) -> Counts:
    """Counts of each forward pass `[steps, L, E]`, summed over the slots of an expert and over ranks.

    With `phy2log` [0, 1, 0, -1] and counts [5, 2, 1, 0], expert 0 got 5 + 1 tokens and expert 1 got 2; slot 3 is empty.
    """
    first = recording[0]
    for other in recording[1:]:
        if not np.array_equal(first.phy2log, other.phy2log):
            raise ValueError(
                f"{first.path} and {other.path.name} end with different maps of slots: experts moved while they were "
                "recorded, so that counts cannot be assigned; record without rebalancing, or in mode stat"
            )
    num_layers, num_experts = len(first.phy2log), int(first.phy2log.max()) + 1
    layer_LP, passes = np.arange(num_layers)[:, None], dict[int, Counts]()
    by_rank = [_physical_counts(dump) for dump in recording]
    for physical in by_rank:
        for number, count_LP in physical.items():
            logical_LE = passes.setdefault(number, np.zeros((num_layers, num_experts + 1)))
            np.add.at(logical_LE, (layer_LP, first.phy2log), count_LP)  # -1, an empty slot, is the last column
    if not passes:
        raise _unlike(first.path, ValueError("it holds no forward pass"))
    if len(by_rank) > 1 and all(_equal(by_rank[0], other) for other in by_rank[1:]):
        log.warning(
            "%s: all %d ranks counted the same tokens in every pass, as under pure tensor parallelism; shares are "
            "right, but loads are %d times too large", first.path.parent, len(by_rank), len(by_rank),
        )  # fmt: skip
    return np.stack([passes[number][:, :num_experts] for number in sorted(passes)])


def _equal(one: dict[int, Counts], other: dict[int, Counts]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[number], other[number]) for number in one)


def _physical_counts(dump: Dump) -> dict[int, Counts]:
    """Tokens of each slot `[L, P]` by forward pass; the parts of a pass that ran in two halves add up."""
    found, seen = dict[int, Counts](), set[tuple[int, str, int]]()
    for record in dump.records:
        try:
            number = int(record["forward_pass_id"])
            place = (number, str(record.get("gatherer_key")), int(record.get("rank", 0)))
            if place in seen:
                raise ValueError(f"forward pass {number} is recorded twice; expected one recording a file")
            seen.add(place)
            count_LP = _slot_counts(record, dump)
        except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
            raise _unlike(dump.path, error) from None
        found[number] = found[number] + count_LP if number in found else count_LP
    return found


def _slot_counts(record: dict[str, Any], dump: Dump) -> Counts:
    """Tokens of each slot in one record, as it counts them or as its tokens' slots add up, `[L, P]`."""
    shape = dump.phy2log.shape
    if COUNT in record or IDS not in record:
        count_LP = check_counts(stored_array(record[COUNT]), dump.path)
        if count_LP.shape != shape:
            raise ValueError(f"a record counts {count_LP.shape} slots, the map has {shape}")
        return count_LP
    ids_LTK = stored_array(record[IDS])
    if ids_LTK.ndim != 3 or ids_LTK.dtype.kind not in "iu" or len(ids_LTK) != shape[0]:
        raise ValueError(
            f"{IDS} is {ids_LTK.dtype} {ids_LTK.shape}, expected slots [layers, tokens, experts of a token] in "
            f"{shape[0]} layers"
        )
    if ids_LTK.size and not -1 <= int(ids_LTK.min()) <= int(ids_LTK.max()) < shape[1]:
        raise ValueError(f"{IDS} holds {int(ids_LTK.min())} to {int(ids_LTK.max())}, expected -1 to {shape[1] - 1}")
    return np.stack([np.bincount(ids[ids >= 0], minlength=shape[1]) for ids in ids_LTK.astype(np.int64)])
