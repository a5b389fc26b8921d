"""What a MoE layer, a batch and a decoder step ask of a GPU, counted: syncs, uploads, kernels, events."""

import gc

import numpy as np
import pytest
import torch

from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.distributed.device import local_device
from runtime.engine.engine import Engine
from runtime.experts.slots import ResidentSlots
from tests.helpers.batches import batches
from tests.helpers.cuda_models import finding, on_cuda
from tests.helpers.cuda_requests import RequestCounts
from tests.helpers.cuda_streams import Event
from tests.helpers.forecasters import Noise
from tests.helpers.pretend_cuda import pretending

BATCHES = 4
LAYER_CALLS = 2 * BATCHES  # the random model has two MoE layers
EXPERTS = "runtime/experts/"


def run(counts: RequestCounts, switch, dtype: torch.dtype, devices: int) -> RequestCounts:
    """Counts of some batches, after one batch at which the engine was warm."""
    redundant = 0 if devices == 1 else 8
    with Engine(on_cuda(switch, dtype), Noise(switch.layout), devices, redundant) as engine:
        list(engine.run(batches(1)))
        counts.reset()
        list(engine.run(batches(BATCHES)))
        return counts.snapshot()


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float32, marks=finding(4, "grouped_mm's fallback downloads the offsets"))],
)
def test_the_host_waits_once_in_a_layer(counts, switch, dtype, devices):
    counts = run(counts, switch, dtype, devices)
    assert counts.total("sync", site=EXPERTS) == counts.total("download", site=EXPERTS) == LAYER_CALLS, str(counts)


@pytest.mark.parametrize(
    "devices", [1, pytest.param(8, marks=finding(17, "each index array is pinned and uploaded on its own"))]
)
def test_a_layer_uploads_once(counts, switch, devices):
    counts = run(counts, switch, torch.bfloat16, devices)
    assert counts.total("upload") <= LAYER_CALLS, str(counts)
    assert counts.total("pageable upload", site=EXPERTS) == 0, str(counts)


def test_kernels_of_a_layer_on_one_device(counts, switch):
    counts = run(counts, switch, torch.bfloat16, 1)
    assert counts.total("kernel", site=EXPERTS) <= 24 * LAYER_CALLS, str(counts)


@finding(20, "masks and tokens are copied from pageable memory")
def test_a_batch_uploads_from_pinned_memory_alone(counts, switch):
    counts = run(counts, switch, torch.bfloat16, 1)
    assert counts.total("pageable upload", site="runtime/") == 0, str(counts)


@finding(7, "every batch ends with torch.cuda.synchronize")
def test_no_batch_waits_for_the_whole_device(counts, switch):
    counts = run(counts, switch, torch.bfloat16, 1)
    assert counts.total("sync", "torch.cuda.synchronize") == 0, str(counts)


@finding(20, "the ids that end a sequence are uploaded in every step")
def test_in_a_decoder_step_the_host_waits_for_the_layer_alone(counts, switch):
    tokens, syncs = batches(1)[0].tokens, []
    with Engine(on_cuda(switch, torch.bfloat16), None, 1, 0) as engine:
        for steps in (4, 4, 9):
            counts.reset()
            engine.generate(tokens, do_sample=False, min_new_tokens=steps, max_new_tokens=steps)
            syncs.append(counts.total("sync", site="runtime/"))
    assert syncs[2] - syncs[1] == 5, str(counts)  # one MoE layer in the decoder


def living_events() -> int:
    gc.collect()
    return sum(type(each) is Event for each in gc.get_objects())


@finding(9, "the events of generate are kept until run takes them")
def test_generate_keeps_no_events(counts, switch):
    tokens, settings = batches(1)[0].tokens, {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    with Engine(on_cuda(switch), None, 1, 0) as engine:
        living = []
        for _ in range(3):
            engine.generate(tokens, **settings)
            living.append(living_events())
    assert living[1] == living[2]


@finding(5, "one process emulates 8 devices unless told otherwise")
def test_one_gpu_is_one_device(counts, switch_folder):
    engine = Engine(switch_folder, None, num_redundant_experts=0)
    assert engine.switch.model.device == torch.device("cuda", 0)
    assert engine.home.num_devices == 1


@finding(6, "grouped_mm refuses 1,024 groups and more")
@pytest.mark.parametrize("experts", [1024, 2048])
def test_a_layer_of_very_many_experts(counts, experts):
    home = ReplicationPlan.at_home(contiguous_homes(1, experts), 1, 0)
    like = torch.empty(1, dtype=torch.bfloat16, device="cuda")
    slots = ResidentSlots(home, 0, range(1), (8, 8), like, torch.nn.ReLU())
    slots.wi_NFD.fill_(1)
    slots.wo_NDF.copy_(torch.arange(experts, device="cuda")[:, None, None].expand(-1, 8, 8))
    size = np.zeros(experts, dtype=np.int64)
    size[[0, 3, experts - 1]] = 1, 2, 1
    rows = slots.compute(torch.full((4, 8), 0.125, dtype=torch.bfloat16, device="cuda"), size, size)
    expected = torch.tensor([0.0, 3, 3, experts - 1]).mul(8).bfloat16()
    assert torch.equal(rows[:, 0].cpu(), expected)


@finding(14, "a process without a GPU of its own asks for one that does not exist")
def test_a_process_beyond_the_last_gpu_computes_on_the_host(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pretending(devices=1):
        assert local_device() == torch.device("cpu")
