"""Mutations: ways in which files are damaged, edited or forged, chosen by a seeded generator.

    changed = mutate(path.read_bytes(), path.suffix, np.random.default_rng(5))

Bytes of any file are changed at random; documents, tables, arrays and headers are changed in their structure
as well, so that what lies behind a parser is reached.
"""

import copy
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

Rng = np.random.Generator
Array = np.ndarray[Any, Any]
LEAVES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 255, 65536, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 10**30, -(2**63), 0.5, -0.5,
    1e308, float("nan"), float("inf"), "", "x", "nan", "../../etc/passwd", "/dev/zero", "/dev/stdin", "a/b",
    "..", ".", "\x00", "\ud800", "é" * 3, "y" * 5000, [], {}, [[]], {"a": 1}, [1, 2, 3], [[1, 2], [3]],
)  # fmt: skip
"""Values that take the place of others in structured documents."""
FORGED = b"forged"
"""A word in the commands of malicious pickles."""


class Payload:
    """An object whose unpickling runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"echo {FORGED.decode()} >&2",)


def flip(content: bytes, rng: Rng) -> bytes:
    """Other values for a few bytes."""
    changed = np.frombuffer(content, np.uint8).copy()
    if len(changed):
        places = rng.integers(0, len(changed), int(rng.integers(1, 9)))
        changed[places] = rng.integers(0, 256, len(places))
    return changed.tobytes()


def cut(content: bytes, rng: Rng) -> bytes:
    """The beginning of the content."""
    return content[: int(rng.integers(0, len(content) + 1))]


def remove(content: bytes, rng: Rng) -> bytes:
    """The content without a part of it."""
    start, stop = np.sort(rng.integers(0, len(content) + 1, 2))
    return content[:start] + content[stop:]


def repeat(content: bytes, rng: Rng) -> bytes:
    """A part of the content comes twice."""
    start, stop = np.sort(rng.integers(0, len(content) + 1, 2))
    return content[:stop] + content[start:]


def insert(content: bytes, rng: Rng) -> bytes:
    """Bytes that were not there: random ones, zeros, marks, line ends, numbers that are lengths elsewhere."""
    parts = (rng.bytes(8), bytes(64), b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b'"', b"{", (2**40).to_bytes(8, "little"))
    place = int(rng.integers(0, len(content) + 1))
    return content[:place] + parts[rng.integers(len(parts))] + content[place:]


def blank(content: bytes, rng: Rng) -> bytes:
    """A part of the content becomes zeros."""
    start, stop = np.sort(rng.integers(0, len(content) + 1, 2))
    return content[:start] + bytes(int(stop - start)) + content[stop:]


def foreign(content: bytes, rng: Rng) -> bytes:
    """The content of another kind of file: nothing, text, an archive, a page, a pointer, pickles that run commands."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("counts.npy", bytes(10**7))  # ten megabytes of zeros in ten kilobytes
    kinds = (
        b"", b"\n", b"\x00" * 100, b"<!doctype html><title>404</title>", pickle.dumps(Payload()),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n", archive.getvalue(),
        pickled_archive(), b"[" * 100_000, b'{"a":' * 20_000, (2**62).to_bytes(8, "little") + b"{}",
    )  # fmt: skip
    return kinds[rng.integers(len(kinds))]


def pickled_archive() -> bytes:
    """A file as torch writes it, whose pickle runs a command."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Payload(), protocol=2))
        file.writestr("archive/version", "3\n")
    return archive.getvalue()


BYTES: tuple[Callable[[bytes, Rng], bytes], ...] = (flip, cut, remove, repeat, insert, blank, foreign)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a JSON document."""
    found = [path] if path else []
    pairs = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in pairs:
        found += places(value, (*path, key))
    return found


def restructure(document: Any, rng: Rng) -> Any:
    """A JSON document with some values replaced, removed, renamed, repeated or wrapped."""
    document = copy.deepcopy(document)
    for _ in range(int(rng.integers(1, 4))):
        found = places(document)
        if not found:
            return document
        *way, last = found[rng.integers(len(found))]
        holder = document
        for key in way:
            holder = holder[key]
        action = rng.integers(6)
        if action == 0:
            del holder[last]
        elif action == 1 and isinstance(holder, dict):
            holder[f"{last}x"] = holder.pop(last)
        elif action == 2 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        elif action == 3:
            holder[last] = [holder[last]]
        else:
            holder[last] = copy.deepcopy(LEAVES[rng.integers(len(LEAVES))])
    return document


def json_text(content: bytes, rng: Rng) -> bytes:
    """A JSON document, changed in its structure."""
    return json.dumps(restructure(json.loads(content), rng)).encode("utf-8", "surrogatepass")


def json_lines(content: bytes, rng: Rng) -> bytes:
    """Lines of JSON, one of them changed in its structure."""
    lines = content.splitlines()
    chosen = int(rng.integers(len(lines)))
    lines[chosen] = json_text(lines[chosen], rng)
    return b"\n".join(lines) + b"\n"


def safetensors_header(content: bytes, rng: Rng) -> bytes:
    """A safetensors file whose header is changed: names, types, shapes, offsets."""
    length = int.from_bytes(content[:8], "little")
    header = json_text(content[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def numpy_header(content: bytes, rng: Rng) -> bytes:
    """An .npy file that promises another shape or type."""
    kinds = ("<i8", "<u8", "<f8", "<f2", "|b1", "|O", "<U3", "<c8", ">i4", "<M8[s]")
    shapes = ((), (0,), (2**40,), (1, 2**31, 2**31), (-1, 2, 2), (3, 4), (6, 2, 8), (2, 2, 2, 2))
    array = np.lib.format.read_array(io.BytesIO(content))
    kind, shape = kinds[rng.integers(len(kinds))], shapes[rng.integers(len(shapes))]
    header = {"descr": kind, "fortran_order": bool(rng.integers(2)), "shape": shape}
    text = (str(header) + " ").encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + array.tobytes()


def arrays(content: bytes, rng: Rng) -> bytes:
    """An .npz archive in which one array is another one, has another name, or is left out."""
    with np.load(io.BytesIO(content)) as file:
        found = {name: file[name] for name in file}
    name = list(found)[rng.integers(len(found))]
    action = rng.integers(4)
    if action == 0:
        del found[name]
    elif action == 1:
        found[f"{name}x"] = found.pop(name)
    else:
        found[name] = array(found[name], rng)
    buffer = io.BytesIO()
    np.savez(buffer, **found)
    return buffer.getvalue()


KINDS = ("u1", "i1", "u8", "f2", "c8", "?", "U4")


def array(values: Array, rng: Rng) -> Array:
    """Another array: some values, the type, the shape or the number of dimensions changed."""
    action = rng.integers(6)
    if action == 0 and values.dtype.kind in "iuf":
        changed = values.astype(np.float64)
        odd = np.array([-1, 2**40, 2**63, 0.5, np.nan, np.inf, -np.inf, 1e308])
        changed.reshape(-1)[rng.integers(0, max(changed.size, 1), 3)] = odd[rng.integers(0, len(odd), 3)]
        return changed
    if action == 1 and values.dtype.kind in "iuf":
        return values.astype(np.dtype(KINDS[rng.integers(len(KINDS))]))
    if action == 2:
        return values[: int(rng.integers(0, len(values) + 1))] if values.ndim else values[None]
    if action == 3:
        return values.reshape(-1) if rng.random() < 0.5 else values[None]
    if action == 4:
        return np.zeros((0, *values.shape[1:]), values.dtype)
    return np.array(["a", "b"]) if rng.random() < 0.5 else np.array(7)


def tensors(content: bytes, rng: Rng) -> bytes:
    """A file of torch whose document is changed: its keys, its values, or a tensor in it."""
    document = torch.load(io.BytesIO(content), weights_only=True)
    found = [way for way in places(document) if isinstance(at(document, way), torch.Tensor)]
    if found and rng.random() < 0.5:
        *way, last = found[rng.integers(len(found))]
        holder = at(document, way)
        kinds = (torch.bfloat16, torch.float64, torch.bool, torch.complex64, torch.uint8)
        tensor = holder[last]
        choices = (
            tensor.to(kinds[rng.integers(len(kinds))]), -tensor, tensor.reshape(-1)[:0], tensor.reshape(-1),
            tensor[None], tensor.double() * float("nan"), tensor.flatten()[:1].expand(2**33), tensor.to_sparse(),
            "tensor",
        )  # fmt: skip
        holder[last] = choices[rng.integers(len(choices))]
    else:
        document = restructure(document, rng)
    buffer = io.BytesIO()
    torch.save(document, buffer)
    return buffer.getvalue()


def at(document: Any, way: Sequence[Any]) -> Any:
    """The value at a path."""
    for key in way:
        document = document[key]
    return document


def table(content: bytes, rng: Rng) -> bytes:
    """A Parquet file in which a column is left out, renamed, of another type, or has other values."""
    found = pq.read_table(io.BytesIO(content))
    place = int(rng.integers(found.num_columns))
    name, action = found.column_names[place], rng.integers(5)
    if action == 0:
        found = found.drop_columns([name])
    elif action == 1:
        found = found.rename_columns([f"{each}x" if each == name else each for each in found.column_names])
    elif action == 2:
        found = found.slice(int(rng.integers(found.num_rows + 1)))
    else:
        rows = found[name].to_pylist()
        for _ in range(int(rng.integers(1, 4)) if rows else 0):
            row = int(rng.integers(len(rows)))
            rows[row] = [None, -1, 2**30, "x", "", [], [1, None], [-5], [2**30]][rng.integers(9)]
        try:
            values = pa.array(rows) if action == 3 else pa.array(rows, found.schema.field(name).type)
        except (pa.ArrowException, OverflowError):  # values that no column holds together
            values = pa.array([str(row) for row in rows])
        found = found.set_column(place, name, values)
    buffer = io.BytesIO()
    pq.write_table(found, buffer)
    return buffer.getvalue()


def yaml_text(content: bytes, rng: Rng) -> bytes:
    """A YAML document, changed in its structure, or one whose aliases stand for billions of values."""
    if rng.random() < 0.1:
        lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
        lines += [f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]" for last, name in pairwise("abcdefghij")]
        return "\n".join(lines).encode()
    return yaml.safe_dump(restructure(yaml.safe_load(content), rng)).encode()


STRUCTURES: dict[str, Callable[[bytes, Rng], bytes]] = {
    ".json": json_text, ".jsonl": json_lines, ".safetensors": safetensors_header, ".npy": numpy_header,
    ".npz": arrays, ".pt": tensors, ".ckpt": tensors, ".parquet": table, ".yaml": yaml_text,
}  # fmt: skip


def mutate(content: bytes, suffix: str, rng: Rng) -> bytes:
    """Changes the content of a file: half of those with a known structure in their structure, all others in bytes."""
    if suffix in STRUCTURES and rng.random() < 0.6:
        return STRUCTURES[suffix](content, rng)
    return BYTES[rng.integers(len(BYTES))](content, rng)
