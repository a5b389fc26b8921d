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
from tests.helpers.cuda_streams import Event
from tests.helpers.cuda_tally import Tally
from tests.helpers.forecasters import Noise
from tests.helpers.pretend_cuda import pretending

BATCHES = 4
LAYER_CALLS = 2 * BATCHES  # the random model has two MoE layers
EXPERTS = "runtime/experts/"


def run(tally: Tally, switch, dtype: torch.dtype, devices: int) -> Tally:
    """Counts of some batches, after one batch at which the engine was warm."""
    redundant = 0 if devices == 1 else 8
    with Engine(on_cuda(switch, dtype), Noise(switch.layout), devices, redundant) as engine:
        list(engine.run(batches(1)))
        tally.reset()
        list(engine.run(batches(BATCHES)))
        return tally.snapshot()


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float32, marks=finding(4, "grouped_mm's fallback downloads the offsets"))],
)
def test_the_host_waits_once_in_a_layer(tally, switch, dtype, devices):
    tally = run(tally, switch, dtype, devices)
    assert tally.total("sync", site=EXPERTS) == tally.total("download", site=EXPERTS) == LAYER_CALLS, tally


@pytest.mark.parametrize(
    "devices", [1, pytest.param(8, marks=finding(17, "each index array is pinned and uploaded on its own"))]
)
def test_a_layer_uploads_once(tally, switch, devices):
    tally = run(tally, switch, torch.bfloat16, devices)
    assert tally.total("upload") <= LAYER_CALLS, tally
    assert tally.total("pageable upload", site=EXPERTS) == 0, tally


def test_kernels_of_a_layer_on_one_device(tally, switch):
    tally = run(tally, switch, torch.bfloat16, 1)
    assert tally.total("kernel", site=EXPERTS) <= 24 * LAYER_CALLS, tally


@finding(20, "masks and tokens are copied from pageable memory")
def test_a_batch_uploads_from_pinned_memory_alone(tally, switch):
    tally = run(tally, switch, torch.bfloat16, 1)
    assert tally.total("pageable upload", site="runtime/") == 0, tally


@finding(7, "every batch ends with torch.cuda.synchronize")
def test_no_batch_waits_for_the_whole_device(tally, switch):
    tally = run(tally, switch, torch.bfloat16, 1)
    assert tally.total("sync", "torch.cuda.synchronize") == 0, tally


def living_events() -> int:
    gc.collect()
    return sum(type(each) is Event for each in gc.get_objects())


@finding(9, "the events of generate are kept until run takes them")
def test_generate_keeps_no_events(tally, switch):
    tokens, settings = batches(1)[0].tokens, {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    with Engine(on_cuda(switch), None, 1, 0) as engine:
        counts = []
        for _ in range(3):
            engine.generate(tokens, **settings)
            counts.append(living_events())
    assert counts[1] == counts[2]


@finding(5, "one process emulates 8 devices unless told otherwise")
def test_one_gpu_is_one_device(tally, switch_folder):
    engine = Engine(switch_folder, None, num_redundant_experts=0)
    assert engine.switch.model.device == torch.device("cuda", 0)
    assert engine.home.num_devices == 1


@finding(6, "grouped_mm refuses 1,024 groups and more")
@pytest.mark.parametrize("experts", [1024, 2048])
def test_a_layer_of_very_many_experts(tally, experts):
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
