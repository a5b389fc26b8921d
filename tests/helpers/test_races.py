"""The race finder: planted faults are found, and the same work in order is not."""

import queue
import threading
from concurrent.futures import Future

import pytest
import torch
from torch.nn.functional import grouped_mm

from tests.helpers.pretend_cuda import pretending
from tests.helpers.races import finding_races


@pytest.fixture
def found():
    with pretending(), torch.no_grad(), finding_races() as found:
        yield found


def copied_beside(block: torch.Tensor, side: torch.cuda.Stream) -> torch.cuda.Event:
    """Writes the second row on a stream beside the current one; the event is behind it."""
    with torch.cuda.stream(side):
        block[1].copy_(block[0])
        return side.record_event()


@pytest.mark.parametrize("waits", [True, False])
def test_a_read_that_does_not_wait_for_the_event_of_a_copy(found, waits):
    block, side = torch.ones(2, 4, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    event = copied_beside(block, side)
    if waits:
        torch.cuda.current_stream().wait_event(event)
    block[1].sum()
    assert found.races.total() == (0 if waits else 1), str(found)
    if not waits:
        ((later, earlier),) = found.races
        assert later.startswith("sum reads at tests/helpers/test_races.py:")
        assert earlier.startswith("copy_ writes at tests/helpers/test_races.py:")


@pytest.mark.parametrize(("waits", "races"), [(True, 0), (False, 3)])
def test_a_copy_that_does_not_wait_for_earlier_reads(found, waits, races):
    block, side = torch.ones(2, 4, device="cuda"), torch.cuda.Stream()
    block[1].sum()
    if waits:
        side.wait_stream(torch.cuda.current_stream())
    copied_beside(block, side)
    assert found.races.total() == races, str(found)  # read against fill, write against fill, write against sum


def test_other_bytes_of_the_same_block_do_not_race(found):
    block, side = torch.ones(3, 4, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    copied_beside(block, side)
    block[2].add_(block[0])
    assert not found.races, str(found)


@pytest.mark.parametrize(("sizes", "races"), [((3, 0, 2), 0), ((3, 1, 1), 1)])
def test_grouped_mm_reads_only_groups_that_have_rows(found, sizes, races):
    weights, side = torch.ones(3, 8, 8, device="cuda", dtype=torch.bfloat16), torch.cuda.Stream()
    rows = torch.ones(5, 8, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor(sizes).cumsum(0).int().pin_memory().to("cuda", non_blocking=True)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        weights[1].fill_(2)
    grouped_mm(rows, weights, offs=ends)
    assert found.races.total() == races, str(found)


@pytest.mark.parametrize("wait", ["nothing", "stream", "event", "device", "query"])
def test_waits_of_the_host_order_later_work(found, wait):
    block, side = torch.ones(2, 4, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    event = copied_beside(block, side)
    {
        "nothing": lambda: None,
        "stream": side.synchronize,
        "event": event.synchronize,
        "device": torch.cuda.synchronize,
        "query": event.query,
    }[wait]()
    block[1].sum()
    assert found.races.total() == (1 if wait == "nothing" else 0), str(found)


@pytest.mark.parametrize("waits", [True, False])
def test_the_host_reads_a_copy_that_has_not_arrived(found, waits):
    on_cuda, pinned = torch.ones(4, device="cuda"), torch.zeros(4, pin_memory=True)
    pinned.copy_(on_cuda, non_blocking=True)
    event = torch.cuda.current_stream().record_event()
    if waits:
        event.synchronize()
    assert pinned.numpy().tolist() == [1, 1, 1, 1]
    assert (pinned + 1).tolist() == [2, 2, 2, 2]
    assert found.races.total() == (0 if waits else 2), str(found)


@pytest.mark.parametrize("waits", [True, False])
def test_the_host_overwrites_memory_that_an_upload_still_reads(found, waits):
    pinned = torch.zeros(4, pin_memory=True)
    torch.empty(4, device="cuda").copy_(pinned, non_blocking=True)
    if waits:
        torch.cuda.current_stream().synchronize()
    pinned.fill_(7)
    assert found.races.total() == (0 if waits else 1), str(found)


def test_a_blocking_download_orders_what_follows(found):
    block, side = torch.ones(2, 4, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        block[1].fill_(3)
        assert block[1].tolist() == [3, 3, 3, 3]
    block[1].sum()
    assert not found.races, str(found)


def handed_over_by(way: str, work) -> None:
    """Runs work on another thread, which tells this one by a lock or not at all, and lets this thread go on."""
    done: Future = Future()
    tasks = queue.SimpleQueue()

    def run():
        tasks.get()()
        if way == "future":
            done.set_result(None)
        else:
            finished.append(True)

    finished = []
    thread = threading.Thread(target=run)
    thread.start()
    tasks.put(work)
    if way == "future":
        done.result(10)
    else:
        while not finished:
            pass


@pytest.mark.parametrize(("way", "races"), [("future", 0), ("untold", 1)])
def test_a_thread_that_waited_for_the_device_must_tell_the_others(found, way, races):
    block, side = torch.ones(2, 4, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    handed_over_by(way, lambda: copied_beside(block, side).synchronize())
    block[1].sum()
    assert found.races.total() == races, str(found)
