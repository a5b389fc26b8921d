"""A rank whose heartbeat stops is named by every other rank, also by ranks that look later."""

import signal
import threading
import time

import pytest
import torch.distributed as dist

import runtime.distributed.heartbeat
from runtime.distributed.heartbeat import Heartbeat, RankLostError


class CountingStore:
    """A job's store that counts the connections opened to it."""

    def __init__(self):
        self._store, self.connections = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), 0

    def clone(self):
        self.connections += 1
        return self._store.clone()


@pytest.fixture
def store():
    return CountingStore()


@pytest.fixture
def ranks(monkeypatch, store):
    """Three ranks' heartbeats in one process."""
    for name, seconds in (("HEARTBEAT_S", 0.02), ("SILENCE_S", 0.4), ("ANNOUNCE_S", 0.2), ("STORE_S", 3.0)):
        monkeypatch.setattr(runtime.distributed.heartbeat, name, seconds)
    handler = signal.getsignal(signal.SIGTERM)
    beats = [Heartbeat(store, rank, 3, timeout_s=0.1) for rank in range(3)]
    for beat in beats:
        beat.start()
    yield beats
    for beat in reversed(beats):
        beat.stop()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_nothing_is_lost_while_all_ranks_beat(ranks, store):
    assert ranks[0].lost() == ""
    # all from before the first beat: a beat would wait while the server looks up a new client's name
    assert store.connections == 2 * len(ranks)


def test_a_silent_rank_is_named_by_all_others(ranks):
    ranks[2].stop()
    assert ranks[0].lost() == "rank 2 is lost"
    threading.Event().wait(0.1)
    assert ranks[1]._announced == "rank 2 is lost"
    assert ranks[1].lost() == "rank 2 is lost"


def test_a_store_that_does_not_respond_counts_as_lost(ranks, monkeypatch):
    monkeypatch.setattr(runtime.distributed.heartbeat, "STORE_S", 0.1)
    monkeypatch.setattr(ranks[1], "_silent_ranks", lambda store: threading.Event().wait())
    assert ranks[1].lost() == "rank 0 is lost, and the store with it"


def test_sigterm_after_a_loss_names_the_lost_rank(ranks):
    ranks[2].stop()
    with pytest.raises(RankLostError, match="rank 2 is lost; rank 0 stops"):
        ranks[0]._terminate(signal.SIGTERM, None)


def test_sigterm_without_a_loss_ends_the_process(ranks):
    with pytest.raises(SystemExit) as stop:
        ranks[0]._terminate(signal.SIGTERM, None)
    assert stop.value.code == 128 + signal.SIGTERM


def test_a_rank_that_waits_for_a_lost_one_for_ever_is_ended(ranks, monkeypatch, capsys):
    ended = threading.Event()

    def end(code):
        assert code == 1
        ranks[0].stop()
        ended.set()

    monkeypatch.setattr(runtime.distributed.heartbeat, "exit_now", end)
    ranks[2].stop()
    ranks[0].waiting_since = time.monotonic()
    assert ended.wait(10)
    assert capsys.readouterr().err == "RankLostError: rank 2 is lost; rank 0 stops\n"


def test_nobody_is_ended_while_all_ranks_beat_or_none_is_waited_for(ranks, monkeypatch):
    monkeypatch.setattr(runtime.distributed.heartbeat, "exit_now", lambda code: pytest.fail("was ended"))
    ranks[0].waiting_since = time.monotonic() - 100
    threading.Event().wait(1.0)
    ranks[0].waiting_since = None
    ranks[2].stop()
    threading.Event().wait(1.0)
