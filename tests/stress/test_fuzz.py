"""A few damaged files for each reader, and that the check finds what it looks for."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from stress import fuzz
from stress.fuzz import run_target
from stress.loaders import TARGETS, Target
from stress.mutations import Payload, mutate, places

pytestmark = pytest.mark.stress
SLOW = {"model weights", "family weights", "tokenizer", "settings"}


@pytest.mark.parametrize("name", [*TARGETS])
def test_damaged_files_are_refused_or_right(name):
    outcomes = run_target(name, seed=1, cases=6 if name in SLOW else 25, progress=Progress(disable=True))
    assert not outcomes.faults, outcomes.first
    assert outcomes.refused + outcomes.taken == (6 if name in SLOW else 25)


def unpickles(folder: Path) -> None:
    pickle.loads(pickle.dumps(Payload()))


def hangs(folder: Path) -> None:
    while True:
        pass


def grows(folder: Path) -> None:
    np.ones(2**28)  # two gibibytes


def ends(folder: Path) -> None:
    os._exit(3)


def litters(folder: Path) -> None:
    (folder / "half.json").write_text("{")


def stumbles(folder: Path) -> None:
    {}["missing"]


def says_nothing(folder: Path) -> None:
    raise ValueError


@pytest.mark.parametrize(
    ("read", "kind"),
    [(unpickles, "code ran"), (hangs, "hangs"), (grows, "memory"), (ends, "process died"), (litters, "left behind"),
     (stumbles, "KeyError"), (says_nothing, "no message")],
)  # fmt: skip
def test_every_kind_of_fault_is_found(tmp_path, monkeypatch, read, kind):
    monkeypatch.setitem(TARGETS, "made up", Target("made up", lambda folder: None, read))
    monkeypatch.setattr(fuzz, "LONGEST_S", 3 if read is hangs else 60)
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "words.txt").write_text("words")
    case, found, _ = fuzz.Worker("made up", tmp_path / "valid", 0, range(1)).next()
    assert (case, found) == (0, kind)


def test_a_case_is_the_same_in_every_run():
    content = b'{"a": [1, {"b": null}], "c": "text"}'
    twice = [[mutate(content, ".json", np.random.default_rng(seed)) for seed in range(50)] for _ in range(2)]
    assert twice[0] == twice[1]
    assert len(set(twice[0])) > 30
    assert places({"a": [1, {"b": None}], "c": "text"}) == [("a",), ("a", 0), ("a", 1), ("a", 1, "b"), ("c",)]
