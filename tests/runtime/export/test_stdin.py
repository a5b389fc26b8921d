"""Loads on standard input: what is taken, and what is refused, with line, layer, expert and value."""

import io
import json

import numpy as np
import pytest

from runtime.export.stdin import read_stream

LOADS = np.arange(6 * 3 * 8).reshape(6, 3, 8)


def stream(content):
    return io.BytesIO(content if isinstance(content, bytes) else content.encode())


def test_json_and_numpy_are_taken():
    buffer, archive = io.BytesIO(), io.BytesIO()
    np.save(buffer, LOADS)
    np.savez(archive, counts=LOADS)
    lines = "\n".join(json.dumps(step.tolist()) for step in LOADS)
    spaced = "\r\n\r\n" + lines.replace("\n", "\n\n").replace("7,", "7.0,")
    for content in (buffer.getvalue(), archive.getvalue(), json.dumps(LOADS.tolist()), lines, spaced):
        assert (read_stream(stream(content)).loads == LOADS).all()
    assert (read_stream(stream(json.dumps(LOADS[0].tolist()))).loads == LOADS[:1]).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[[1, 2], [3, 4]]\n\n[[1, 2], [3]]", "line 3: layer 1 has 1 experts, the layers before 2"),
        ("[[1, 2]]\n[[1, 2, 3]]", "line 2: layer 0 has 3 experts, the layers before 2"),
        ("[[1, 2]]\n[[1, 2], [3, 4]]", "line 2 has 2 layers, the lines before 1"),
        ("[[[1, 2]], [[1]]]", "line 1, step 1: layer 0 has 1 experts, the layers before 2"),
        ("[[1, 2]]\n[[1, NaN]]", "line 2 holds NaN, expected whole numbers of tokens, 0 to 9007199254740992"),
        ("[[1, -Infinity]]", "line 1 holds -Infinity, expected whole numbers"),
        ("[[1, 1e400]]", "line 1 holds 1e400, expected whole numbers"),
        (f"[[1, {'9' * 5000}]]", "line 1 holds a number with too many digits, expected whole numbers"),
        (f"[[1, {10**22}]]", "line 1: layer 0, expert 1 is 10000000000000000000000, expected a whole number"),
        ("[[1, -1]]", "line 1: layer 0, expert 1 is -1, expected a whole number of tokens, 0 to 9007199254740992"),
        ("[[0.5, 1]]", "line 1: layer 0, expert 0 is 0.5, expected a whole number"),
        ('[["a", 1]]', 'line 1: layer 0, expert 0 is "a", expected a whole number'),
        ("[[true, 1]]", "line 1: layer 0, expert 0 is true, expected a whole number"),
        ("[[1, null]]", "line 1: layer 0, expert 1 is null, expected a whole number"),
        ("[[1, 2], null]", "line 1: layer 1 is null, expected a list of tokens of each expert"),
        ("[1, 2]", "line 1: layer 0 is 1, expected a list of tokens of each expert"),
        ("[[1, 2]]\nnull", "line 2 is null, expected the JSON of a step, [[tokens of each expert], ...]"),
        ('{"a": 1}', "line 1 is an object, expected the JSON of a step"),
        ("[]", "line 1 is an empty list, expected the JSON of a step"),
        ("[[1, 2]]\n[[1,", "line 2 is not JSON (Expecting value, column 5), expected the JSON of a step"),
        ("[" * 50_000, "line 1 is not JSON (maximum recursion depth"),
        (b"[[1, 2]]\n\xff", "line 2 is not JSON ('utf-8' codec"),
        ("", "standard input is empty, expected .npy, .npz, or on each line the JSON of a step"),
        (" \n", "standard input is empty"),
        (b"\x93NUMPY rubbish", "standard input cannot be read"),
        ("[[0, 0]]", "standard input holds no tokens"),
    ],
)
def test_what_is_no_load_is_named(content, said):
    with pytest.raises(ValueError, match="standard input") as refused:
        read_stream(stream(content))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 250
