"""A rank whose heartbeat stops is named by every other rank, also by ranks that look later."""

import signal
import threading

import pytest
import torch.distributed as dist

import runtime.distributed.heartbeat
from runtime.distributed.heartbeat import Heartbeat, RankLostError


@pytest.fixture
def ranks(monkeypatch):
    """Three ranks' heartbeats in one process."""
    for name, seconds in (("HEARTBEAT_S", 0.02), ("SILENCE_S", 0.4), ("ANNOUNCE_S", 0.2)):
        monkeypatch.setattr(runtime.distributed.heartbeat, name, seconds)
    handler = signal.getsignal(signal.SIGTERM)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    beats = [Heartbeat(store, rank, 3) for rank in range(3)]
    for beat in beats:
        beat.start()
    yield beats
    for beat in reversed(beats):
        beat.stop()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_nothing_is_lost_while_all_ranks_beat(ranks):
    assert ranks[0].lost() == ""


def test_a_silent_rank_is_named_by_all_others(ranks):
    ranks[2].stop()
    assert ranks[0].lost() == "rank 2 is lost"
    threading.Event().wait(0.1)
    assert ranks[1]._announced == "rank 2 is lost"
    assert ranks[1].lost() == "rank 2 is lost"


def test_sigterm_after_a_loss_names_the_lost_rank(ranks):
    ranks[2].stop()
    with pytest.raises(RankLostError, match="rank 2 is lost; rank 0 stops"):
        ranks[0]._terminate(signal.SIGTERM, None)


def test_sigterm_without_a_loss_ends_the_process(ranks):
    with pytest.raises(SystemExit) as stop:
        ranks[0]._terminate(signal.SIGTERM, None)
    assert stop.value.code == 128 + signal.SIGTERM
