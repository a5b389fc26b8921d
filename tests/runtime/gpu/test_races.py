"""Weights that move beside running batches: events order every access, whichever stream the caller computes on."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from runtime.distributed.device import BackgroundCopies
from runtime.engine.engine import Engine
from tests.helpers.batches import batches
from tests.helpers.budgets import budget
from tests.helpers.cuda_models import on_cuda
from tests.helpers.cuda_streams import Stream
from tests.helpers.forecasters import Noise
from tests.helpers.pretend_cuda import pretending
from tests.helpers.races import RaceFinder, finding_races

DEVICES, REDUNDANT = 4, 8


def run(engine: Engine) -> None:
    outputs = list(engine.run(batches()))
    assert sum(output.stats.preparation.moves for output in outputs if output.stats.preparation) > 0


def generate(engine: Engine) -> None:
    engine.generate(batches(1)[0].tokens, replan_every=1, do_sample=False, min_new_tokens=8, max_new_tokens=8)


def races(switch, work, own_stream: bool = False) -> RaceFinder:
    with pretending(), finding_races() as found:
        engine = Engine(on_cuda(switch), Noise(switch.layout), DEVICES, REDUNDANT)
        with torch.cuda.stream(torch.cuda.Stream()) if own_stream else nullcontext(), engine:
            work(engine)
    return found


@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("work", [run, generate])
def test_moves_and_batches_are_ordered(switch, work, own_stream):
    found = races(switch, work, own_stream)
    assert not found.races, str(found)


def test_without_waits_of_streams_moves_race(switch):
    with mock.patch.object(Stream, "wait_event", return_value=None):
        assert races(switch, run).races


@pytest.mark.parametrize("work", [run, generate])
def test_moves_that_wait_for_the_default_stream_alone_race_on_the_callers(switch, work):
    def default_alone(copies: BackgroundCopies) -> None:
        copies._computed = torch.cuda.default_stream().record_event()

    with mock.patch.object(BackgroundCopies, "computed", default_alone):
        assert races(switch, work, own_stream=True).races


def test_tiers_load_experts_in_order(switch_folder):
    memory = {"device_memory": budget(3), "host_memory": budget(5)}
    with pretending(), finding_races() as found, Engine(switch_folder, None, **memory) as engine:
        list(engine.run(batches()))
    assert not found.races, str(found)
