"""Loads on standard input: .npy, .npz, or JSON, the loads of one step on each line.

    [[9, 1, 1, 1], [2, 2, 2, 2]]
    [[7, 3, 1, 1], [3, 2, 2, 1]]

are two steps of two layers of four experts. One line alone may hold all steps. What is wrong is named by its line.

Shape suffixes: N steps, L MoE layers, E logical experts.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from data.arrays import IntArray
from data.errors import shown
from data.traces.loads import MOST_TOKENS, RecordedLoads, read_loads

NAME = "standard input"
MAGIC = {b"\x93NUMPY": ".npy", b"PK": ".npz"}
MOST_BYTES = 256 << 20
"""Most bytes that are read."""
STEP = "the JSON of a step, [[tokens of each expert], ...] with a row for each layer"


def read_stream(stream: Any) -> RecordedLoads:
    """Loads from a stream of bytes.

    Raises:
        ValueError: If it holds something else; in JSON, naming line, layer, expert and value.
    """
    content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{NAME} holds more than {MOST_BYTES:,} bytes of loads; give a file")
    if kind := next((suffix for magic, suffix in MAGIC.items() if content.startswith(magic)), None):
        return _numpy(content, kind)
    lines = {f"line {number}": line for number, line in enumerate(content.splitlines(), 1) if line.strip()}
    if not lines:
        raise ValueError(f"{NAME} is empty, expected .npy, .npz, or on each line {STEP}")
    steps = ((place, _json(place, line)) for place, line in lines.items())
    try:
        loads = _loads(_spread(*next(steps)) if len(lines) == 1 else steps)
    except ValueError as error:
        raise ValueError(f"{NAME}: {error}") from None
    return RecordedLoads(NAME, loads).with_tokens()


def _numpy(content: bytes, suffix: str) -> RecordedLoads:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"loads{suffix}"
        path.write_bytes(content)
        try:
            return replace(read_loads(path), name=NAME)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), NAME)) from None


def _json(place: str, line: bytes) -> Any:
    """The JSON of a line; numbers that no count can be are refused as they are written."""
    try:
        return json.loads(line, parse_constant=_refuse, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error.msg}, column {error.colno}), expected {STEP}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}), expected {STEP}") from None
    except ValueError as error:
        reason = "a number with too many digits" if "integer string" in str(error) else error
        raise ValueError(f"{place} holds {reason}, expected whole numbers of tokens, 0 to {MOST_TOKENS}") from None


def _finite(text: str) -> float:
    return value if np.isfinite(value := float(text)) else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)


def _spread(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The steps of a stream's only line, each with its place: the line may hold one, or a list of them."""
    rows = value[0] if isinstance(value, list) and value else None
    if isinstance(rows, list) and rows and isinstance(rows[0], list):
        yield from ((f"{place}, step {number}", step) for number, step in enumerate(value))
    else:
        yield place, value


def _loads(steps: Iterable[tuple[str, Any]]) -> IntArray:
    """Loads `[N, L, E]` of steps, each with the place where it stands."""
    layers: int | None = None
    experts: int | None = None
    arrays = []
    for place, step in steps:
        if not isinstance(step, list) or not step:
            raise ValueError(f"{place} is {shown(step)}, expected {STEP}")
        if len(step) != (layers := layers or len(step)):
            raise ValueError(f"{place} has {len(step)} layers, the lines before {layers}")
        for layer, row in enumerate(step):
            if not isinstance(row, list) or not row:
                raise ValueError(f"{place}: layer {layer} is {shown(row)}, expected a list of tokens of each expert")
            if len(row) != (experts := experts or len(row)):
                raise ValueError(f"{place}: layer {layer} has {len(row)} experts, the layers before {experts}")
            for expert, tokens in enumerate(row):
                if type(tokens) not in (int, float) or not 0 <= tokens <= MOST_TOKENS or tokens % 1:
                    raise ValueError(
                        f"{place}: layer {layer}, expert {expert} is {shown(tokens)}, expected a whole number of "
                        f"tokens, 0 to {MOST_TOKENS}"
                    )
        arrays.append(np.array(step, dtype=np.int64))
    return np.stack(arrays)
