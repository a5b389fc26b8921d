"""Requests recorded token by token in one .npz file, and their parts: training, validation, test, unseen subjects.

| array | shape | meaning |
|---|---|---|
| `tokens` | `[sum of length]` | token ids of each request, one request after the other |
| `length`, `first_routed`, `routed` | `[requests]` | tokens; position of the first routed token; routed tokens |
| `experts` | `[sum of routed, L, K]` | experts of each routed token in each layer, likeliest first |
| `subject`, `subjects` | `[requests]`, names | subject of each request; may be missing |
| `vocabulary` | one number | token ids; may be missing: one more than the largest |

`experts` need not exist for every token: the tokens before the first routed one are context.
"""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.arrays import MOST_EXPERTS, IntArray
from data.models.layout import MoELayout
from data.traces.numpy_file import Arrays, array_names, read_arrays
from data.traces.requests import RecordedRequest

MOST_TOKEN = 2**31 - 1
"""Largest token id that a trace can hold."""
NEEDED = ("tokens", "length", "first_routed", "routed", "experts")
UNSEEN, SEEN = "unseen", "prefill"
"""Phases: requests on subjects that are in no training request, and the others."""
UNSEEN_SHARE, TRAIN_SHARE, VAL_SHARE = 0.15, 0.65, 0.12
"""Share of subjects held out; of the other subjects' requests, the share for training and for validation."""
log = logging.getLogger(__name__)


def holds_tokens(path: Path) -> bool:
    """Whether a file is an .npz with the array `tokens`; its other arrays are not checked."""
    return path.suffix == ".npz" and path.is_file() and "tokens" in array_names(path)


def read_token_recording(
    path: Path, model_id: str = "", num_experts: int | None = None
) -> tuple[list[RecordedRequest], MoELayout]:
    """Reads the requests with routed tokens, in the order of the file, and a layout without weights and embeddings.

    Args:
        path: The .npz file.
        model_id: Name of the model; by default the file's.
        num_experts: Experts of a layer; by default one more than the largest id.

    Raises:
        ValueError: Naming the array that is missing, of another shape, or holds wrong numbers.
    """
    arrays = read_arrays(path)
    _check(path, arrays)
    tokens, experts = arrays["tokens"].astype(np.int64), arrays["experts"].astype(np.int16)
    names = _subjects(path, arrays)
    token_stop, route_stop = arrays["length"].cumsum(), arrays["routed"].cumsum()
    if silent := int((arrays["routed"] == 0).sum()):
        log.warning("%s: %d of %d requests have no routed token and are left out", path, silent, len(arrays["routed"]))
    requests = []
    columns = (
        arrays[name].tolist() for name in ("length", "first_routed", "routed")
    )  # whole numbers, which never wrap
    for number, (length, first, routed) in enumerate(zip(*columns, strict=True)):
        if first + routed > length:
            raise ValueError(f"{path}: request {number} has {length} tokens, but routes up to token {first + routed}")
        if not routed:
            continue
        own = tokens[token_stop[number] - length : token_stop[number]]
        routes = experts[route_stop[number] - routed : route_stop[number]]
        requests.append(RecordedRequest(number, names[number], SEEN, "train", own, first, routes))
    found = int(experts.max()) + 1
    if num_experts is not None and num_experts < found:
        raise ValueError(f"{path} holds expert {found - 1}, the model has {num_experts} experts; give {found} or more")
    vocabulary = int(arrays["vocabulary"]) if "vocabulary" in arrays else int(tokens.max()) + 1
    if int(tokens.max()) >= vocabulary:
        raise ValueError(f"{path} holds token id {int(tokens.max())}, its vocabulary has {vocabulary}")
    layout = MoELayout(
        model_id or path.stem, "", tuple(("decoder", layer) for layer in range(experts.shape[1])),
        num_experts or found, None, d_model=0, d_ff=0, vocab_size=vocabulary, family="recording",
        experts_per_token=experts.shape[2], causal=True,
    )  # fmt: skip
    return requests, layout


def _check(path: Path, arrays: Arrays) -> None:
    if missing := [name for name in NEEDED if name not in arrays]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; expected the arrays {', '.join(NEEDED)}")
    if wrong := [name for name in NEEDED if arrays[name].dtype.kind not in "iu"]:
        raise ValueError(f"{path}: {wrong[0]} holds {arrays[wrong[0]].dtype}, expected whole numbers")
    if arrays["length"].ndim != 1:
        raise ValueError(f"{path}: length has shape {arrays['length'].shape}, expected one number a request")
    sizes = {name: arrays[name].shape for name in NEEDED}
    count = len(arrays["length"])
    expected = {"tokens": (int(arrays["length"].sum()),), "first_routed": (count,), "routed": (count,)}
    for name, shape in expected.items():
        if sizes[name] != shape:
            raise ValueError(f"{path}: {name} has shape {sizes[name]}, expected {shape}, as length says")
    if arrays["experts"].ndim != 3 or len(arrays["experts"]) != arrays["routed"].sum() or 0 in sizes["experts"]:
        raise ValueError(
            f"{path}: experts has shape {sizes['experts']}, expected [{arrays['routed'].sum()}, layers, experts of a "
            "token], as routed says"
        )
    if min(int(arrays[name].min()) for name in NEEDED) < 0:
        raise ValueError(f"{path} holds negative numbers; expected ids, lengths and positions")
    for name, most in (("experts", MOST_EXPERTS - 1), ("tokens", MOST_TOKEN)):
        if (largest := int(arrays[name].max())) > most:
            raise ValueError(f"{path}: {name} holds {largest}, expected at most {most}")
    if "vocabulary" in arrays and (arrays["vocabulary"].ndim or arrays["vocabulary"].dtype.kind not in "iu"):
        raise ValueError(f"{path}: vocabulary is not one whole number")


def _subjects(path: Path, arrays: Arrays) -> list[str]:
    """Name of each request's subject; "text" for all where subjects are missing."""
    count = len(arrays["length"])
    if "subject" not in arrays:
        return ["text"] * count
    subject, names = arrays["subject"], arrays.get("subjects")
    if subject.dtype.kind not in "iu" or (names is not None and names.ndim != 1):
        raise ValueError(
            f"{path}: subject holds {subject.dtype}, expected the number of each request's name in subjects"
        )
    if subject.shape != (count,) or (names is not None and not ((subject >= 0) & (subject < len(names))).all()):
        raise ValueError(
            f"{path}: subject has shape {subject.shape}, expected a number in subjects for each of {count}"
        )
    return [str(number if names is None else names[number]) for number in subject]


def divided(requests: list[RecordedRequest], seed: int = 0) -> list[RecordedRequest]:
    """The requests with their splits: all of training, then validation, then test, then unseen subjects (test).

    Each part is subject after subject. `UNSEEN_SHARE` of the subjects are drawn for the phase `unseen`; the requests of
    each other subject are divided in their order. One subject alone is not held out.
    """
    subjects = list(dict.fromkeys(request.segment for request in requests))
    drawn = np.random.default_rng(seed).permutation(len(subjects))[: round(len(subjects) * UNSEEN_SHARE)]
    unseen = {subjects[index] for index in drawn} if len(subjects) > 1 else set[str]()
    parts: dict[str, list[RecordedRequest]] = {"train": [], "val": [], "test": [], UNSEEN: []}
    for subject in subjects:
        own = [request for request in requests if request.segment == subject]
        for split, request in zip(_splits(len(own)), own, strict=True):
            if subject in unseen:
                parts[UNSEEN].append(replace(request, split="test", phase=UNSEEN))
            else:
                parts[split].append(replace(request, split=split))
    return [request for part in parts.values() for request in part]


def _splits(count: int) -> list[str]:
    """Splits of a subject's requests in time order: of 5, three train, one val, one test."""
    places = (np.arange(count) + 0.5) / count
    edges: IntArray = np.searchsorted([TRAIN_SHARE, TRAIN_SHARE + VAL_SHARE], places, side="right")
    return [("train", "val", "test")[edge] for edge in edges]
