"""What a MoE layer, a batch and a decoder step ask of a GPU, counted: syncs, uploads, kernels, events."""

import copy
import gc

import numpy as np
import pytest
import torch

from benchmarks.one_device import grouped
from data.models.device import pick_device
from data.models.expert import ExpertFormat
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.distributed.ranks import Ranks
from runtime.engine.batch import forward
from runtime.engine.engine import Engine
from runtime.experts.grouped_mm import ExpertFunction
from runtime.experts.layer import ReplicatedExperts
from runtime.experts.slots import ResidentSlots
from tests.helpers.batches import batches
from tests.helpers.cuda_models import on_cuda
from tests.helpers.cuda_requests import RequestCounts
from tests.helpers.cuda_streams import Event
from tests.helpers.forecasters import Noise
from tests.helpers.pretend_cuda import pretending

BATCHES = 4
LAYER_CALLS = 2 * BATCHES  # the random model has two MoE layers
EXPERTS = "runtime/experts/"


def run(counts: RequestCounts, switch, dtype: torch.dtype, devices: int, measure: bool | None = None) -> RequestCounts:
    """Counts of some batches, after one batch at which the engine was warm."""
    redundant = 0 if devices == 1 else 8
    with Engine(on_cuda(switch, dtype), Noise(switch.layout), devices, redundant, measure=measure) as engine:
        list(engine.run(batches(1)))
        counts.reset()
        list(engine.run(batches(BATCHES)))
        return counts.snapshot()


@pytest.mark.parametrize(("devices", "dtype", "waits"), [
    (1, torch.bfloat16, 0), (1, torch.float32, 1), (8, torch.bfloat16, 1), (8, torch.float32, 1),
])  # fmt: skip
def test_how_often_the_host_waits_in_a_layer(counts, switch, dtype, devices, waits):
    counts = run(counts, switch, dtype, devices)
    assert counts.total("sync", site="runtime/") == waits * LAYER_CALLS, str(counts)


@pytest.mark.parametrize(("devices", "uploads"), [(1, 0), (8, 1)])
def test_a_layer_uploads_once(counts, switch, devices, uploads):
    counts = run(counts, switch, torch.bfloat16, devices)
    of_batches = 5 * BATCHES  # three tensors of tokens, two masks
    assert counts.total("upload", site="runtime/") == of_batches + uploads * LAYER_CALLS, str(counts)


def test_kernels_of_a_layer_on_one_device(counts, switch):
    counts = run(counts, switch, torch.bfloat16, 1)
    assert counts.total("kernel", site=EXPERTS) == 19 * LAYER_CALLS, str(counts)


@pytest.mark.parametrize(("devices", "measure"), [(1, False), (1, None), (8, True)])
def test_times_take_events_only_if_they_are_measured(counts, switch, devices, measure):
    counts = run(counts, switch, torch.bfloat16, devices, measure)
    assert (counts.total("timing event") > 0) == bool(measure)


def test_loads_that_the_device_alone_has_counted_are_those_of_the_plain_layers(counts, switch):
    with Engine(on_cuda(switch, torch.bfloat16)) as engine:
        ours = [output.stats.load for output in engine.run(batches(2))]
    plain = copy.deepcopy(switch.model).bfloat16()
    with Engine(plain, None, 8, 8) as engine:
        theirs = [output.stats.load for output in engine.run(batches(2))]
    assert np.array_equal(ours, theirs)


def test_a_batch_uploads_from_pinned_memory_alone(counts, switch):
    counts = run(counts, switch, torch.bfloat16, 1)
    assert counts.total("pageable upload", site="runtime/") == 0, str(counts)


def test_no_batch_waits_for_the_whole_device(counts, switch):
    counts = run(counts, switch, torch.bfloat16, 1)
    assert counts.total("sync", "torch.cuda.synchronize") == 0, str(counts)


def test_in_a_decoder_step_the_host_does_not_wait(counts, switch):
    tokens, syncs = batches(1)[0].tokens, []
    with Engine(on_cuda(switch, torch.bfloat16), None, 1, 0) as engine:
        for steps in (4, 4, 9):
            counts.reset()
            engine.generate(tokens, do_sample=False, min_new_tokens=steps, max_new_tokens=steps)
            syncs.append(counts.total("sync", site="runtime/"))
    assert syncs[1] == syncs[2], str(counts)


def living_events() -> int:
    gc.collect()
    return sum(type(each) is Event for each in gc.get_objects())


def test_generate_keeps_no_events(counts, switch):
    tokens, settings = batches(1)[0].tokens, {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    with Engine(on_cuda(switch), None, 1, 0) as engine:
        living = []
        for _ in range(3):
            engine.generate(tokens, **settings)
            living.append(living_events())
    assert living[1] == living[2]


def test_closing_waits_for_the_stream_of_moves(counts, switch):
    with Engine(on_cuda(switch), Noise(switch.layout), 8, 8) as engine:
        list(engine.run(batches(1)))
        counts.reset()
    assert counts.total("sync", "Stream.synchronize") == 1, str(counts)


def test_one_gpu_is_one_device(counts, switch_folder):
    engine = Engine(switch_folder, None, num_redundant_experts=0)
    assert engine.loaded.model.device == torch.device("cuda", 0)
    assert engine.home.num_devices == 1


def bfloat16_slots(experts: int) -> ResidentSlots:
    """Slots of one device, with matrices of 8 x 8."""
    home = ReplicationPlan.at_home(contiguous_homes(1, experts), 1, 0)
    like = torch.empty(1, dtype=torch.bfloat16, device="cuda")
    return ResidentSlots(home, 0, range(1), ExpertFunction(ExpertFormat.plain(8, 8), torch.nn.ReLU()), like)


@pytest.mark.parametrize("experts", [1024, 2048])
def test_a_layer_of_very_many_experts(counts, experts):
    slots = bfloat16_slots(experts)
    slots.tensors[0].fill_(1)
    slots.tensors[1].copy_(torch.arange(experts, device="cuda")[:, None, None].expand(-1, 8, 8))
    size = np.zeros(experts, dtype=np.int64)
    size[[0, 3, experts - 1]] = 1, 2, 1
    rows = slots.compute(torch.full((4, 8), 0.125, dtype=torch.bfloat16, device="cuda"), size, size, None)
    expected = torch.tensor([0.0, 3, 3, experts - 1]).mul(8).bfloat16()
    assert torch.equal(rows[:, 0].cpu(), expected)


def test_a_process_beyond_the_last_gpu_computes_on_the_host(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pretending(devices=1):
        assert pick_device() == torch.device("cpu")


def test_plain_calls_keep_no_events_and_are_not_counted_to_a_batch(counts, switch):
    batch = batches(1)[0]
    with Engine(on_cuda(switch), None, 8, 8, measure=True) as engine:
        list(engine.run([batch]))
        forward(engine.loaded.model, batch)
        counts.reset()
        forward(engine.loaded.model, batch)
        assert counts.total("timing event") == 0, str(counts)


def test_the_plain_grouped_layer_that_docs_compare_with(counts):
    slots = ReplicatedExperts(bfloat16_slots(64), np.arange(64), Ranks(), 1)
    one_hot = torch.nn.functional.one_hot(torch.arange(256) % 64, 64)[:, None].to("cuda")
    inputs = torch.randn(256, 8).bfloat16().to("cuda"), one_hot, torch.rand(256, 1).bfloat16().to("cuda")
    layer = grouped(slots)
    counts.reset()
    layer(*inputs)
    assert (counts.total("kernel"), counts.total("sync"), counts.total("upload")) == (19, 0, 0), str(counts)
