"""Which device a process takes: as asked, its own CUDA device, or the CPU."""

import pytest
import torch

from data.models.device import pick_device


@pytest.mark.parametrize(
    ("asked", "rank", "found", "expected"),
    [
        (None, "0", 0, "cpu"),
        (None, "1", 2, "cuda:1"),
        (None, "2", 2, "cpu"),
        ("cpu", "0", 2, "cpu"),
        ("cuda", "1", 2, "cuda:1"),
    ],
)
def test_as_asked_and_one_for_each_process(asked, rank, found, expected, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    assert str(pick_device(asked)) == expected


@pytest.mark.parametrize(
    ("found", "message"), [(0, "torch finds none;"), (2, "finds 2 for process 2 of this machine;")]
)
def test_cuda_is_refused_where_the_process_has_none(found, message, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    with pytest.raises(ValueError, match=message):
        pick_device("cuda")
