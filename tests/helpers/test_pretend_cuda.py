"""Pretended CUDA refuses what CUDA refuses, counts what a GPU would do, and leaves nothing behind."""

import copy
import threading

import pytest
import torch
from torch.nn.functional import embedding, grouped_mm

from tests.conftest import small_switch
from tests.helpers.cuda_streams import CONTEXTS
from tests.helpers.pretend_cuda import pretending

MIXED = "Expected all tensors to be on the same device, but found at least two devices, cpu and cuda:0!"


@pytest.fixture(params=[torch.enable_grad, torch.no_grad, torch.inference_mode])
def counts(request):
    with pretending() as counts, request.param():
        yield counts


def test_tensors_say_they_are_on_cuda_and_hold_real_values(counts):
    table = torch.arange(6.0).view(2, 3).to("cuda")
    assert (table.device, table.is_cuda, table.is_cpu) == (torch.device("cuda:0"), True, False)
    assert (table * 2 + torch.ones(2, 3, device="cuda")).tolist() == [[1, 3, 5], [7, 9, 11]]
    assert table[1].sum().item() == 12
    table[0].fill_(9)
    assert table.t().cpu().tolist() == [[9, 3], [9, 4], [9, 5]]
    assert torch.tensor([1, 2], device="cuda").device.index == 0
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        table.numpy()


def test_mixed_devices_are_refused(counts):
    on_cuda, on_host = torch.ones(3, 4, device="cuda"), torch.ones(3, 4)
    index, mask = torch.tensor([1, 2]), torch.tensor([True, False, True])
    for operation in (
        lambda: on_cuda + on_host,
        lambda: on_host @ on_cuda.t(),
        lambda: embedding(index, on_cuda),
        lambda: embedding(index.cuda(), on_host),
        lambda: on_cuda.index_select(0, index),
        lambda: on_cuda.masked_fill(mask[:, None], 0.0),
        lambda: torch.where(mask[:, None], on_cuda, 0.0),
        lambda: torch.cat([on_cuda, on_host]),
        lambda: on_host.add_(on_cuda),
    ):
        with pytest.raises(RuntimeError, match=MIXED):
            operation()
    for foreign in (index.cuda(), mask.cuda()):
        with pytest.raises(RuntimeError, match=r"either on cpu or on the same device as the indexed tensor \(cpu\)"):
            on_host[foreign]
    with pytest.raises(RuntimeError, match=r"cuda:0 and cpu! \(when checking the value"):
        on_cuda[index.cuda()] = on_host[:2]


def test_what_cuda_allows_across_devices_is_allowed_and_counted(counts):
    on_cuda = torch.ones(3, 4, device="cuda")
    assert (on_cuda + torch.tensor(2.0)).sum().item() == 36
    counts.reset()
    assert on_cuda[torch.tensor([0, 2])].shape == (2, 4)
    assert (counts.total("pageable upload"), counts.total("sync")) == (1, 1)
    assert on_cuda[torch.tensor([True, False, True], device="cuda")].shape == (2, 4)
    assert counts.total("sync", "with a mask") == 1


def test_two_devices_are_kept_apart():
    with pretending(devices=2):
        first, second = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
        with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cuda:1"):
            first + second
        assert (first.to("cuda:1") + second).tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.cuda.set_device(2)


@pytest.mark.parametrize(
    ("copy_it", "expected"),
    [
        (lambda t: t.cuda(), {"pageable upload": 1, "sync": 1}),
        (lambda t: t.to("cuda", non_blocking=True), {"pageable upload": 1, "sync": 1}),
        (lambda t: t.pin_memory().to("cuda"), {"upload": 1, "sync": 1, "pin": 1}),
        (lambda t: t.pin_memory().to("cuda", non_blocking=True), {"upload": 1, "pin": 1}),
        (lambda t: torch.empty(3, device="cuda").copy_(t), {"pageable upload": 1, "sync": 1}),
        (lambda t: torch.tensor([1.0], device="cuda"), {"pageable upload": 1, "sync": 1}),
    ],
)
def test_uploads(counts, copy_it, expected):
    host = torch.ones(3)
    counts.reset()
    copy_it(host)
    kinds = ("upload", "pageable upload", "download", "sync", "pin")
    assert {kind: number for kind in kinds if (number := counts.total(kind))} == expected


def test_downloads(counts):
    on_cuda, pinned = torch.ones(3, device="cuda"), torch.empty(3, pin_memory=True)
    assert pinned.is_pinned()
    counts.reset()
    assert on_cuda.cpu().tolist() == [1, 1, 1]
    assert (counts.total("download"), counts.total("sync")) == (1, 1)
    later = on_cuda.to("cpu", non_blocking=True)
    pinned.copy_(on_cuda, non_blocking=True)
    assert later.is_pinned()
    assert (counts.total("download"), counts.total("sync")) == (3, 1)
    torch.empty(3).copy_(on_cuda, non_blocking=True)  # pageable: the host waits whatever it says
    assert (counts.total("download"), counts.total("sync")) == (4, 2)
    assert sorted(counts.by_site("download", "tests/helpers/test_pretend_cuda.py:").values()) == [1, 1, 1, 1]


def test_hidden_syncs(counts):
    on_cuda = torch.tensor([0.0, 1.0, 2.0], device="cuda")
    for wait in (lambda: on_cuda.nonzero(), lambda: bool(on_cuda.any()), lambda: on_cuda.unique(), on_cuda.tolist):
        counts.reset()
        wait()
        assert counts.total("sync") == 1


@pytest.mark.parametrize(("dtype", "kernels", "syncs"), [(torch.bfloat16, 2, 0), (torch.float32, 3, 1)])
def test_grouped_mm_fast_and_slow(counts, dtype, kernels, syncs):
    ends = torch.tensor([2, 2, 5], dtype=torch.int32, device="cuda")
    rows = torch.ones(5, 8, device="cuda", dtype=dtype)
    weights = torch.ones(3, 16, 8, device="cuda", dtype=dtype).transpose(1, 2)
    counts.reset()
    product = grouped_mm(rows, weights, offs=ends)
    assert (counts.total("kernel"), counts.total("sync")) == (kernels, syncs)
    assert product.tolist() == [[8.0] * 16] * 5


def test_grouped_mm_limits(counts):
    rows, ends = torch.ones(2, 8, device="cuda").bfloat16(), torch.full((1024,), 2, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match="Can't process more than 1024 groups"):
        grouped_mm(rows, torch.ones(1024, 8, 8, device="cuda").bfloat16(), offs=ends)
    weights = torch.ones(1, 8, 4, device="cuda").bfloat16()
    with pytest.raises(RuntimeError, match="strides should be multiple of 16 bytes"):
        grouped_mm(rows, weights, offs=ends[:1])


def test_other_threads_are_covered(counts):
    found = []

    def work():
        with torch.inference_mode():
            found.append(torch.zeros(2, device="cuda").add_(torch.ones(2).to("cuda")).tolist())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[1, 1]]


def test_a_tensor_made_in_inference_mode_can_be_used_and_changed_outside():
    with pretending():
        with torch.inference_mode():
            block = torch.zeros(4, 2, device="cuda")
            part = block[1:3]
        with torch.no_grad():
            part.copy_(torch.ones(2, 2, device="cuda"))
        with torch.inference_mode():
            part.view(-1).add_(1)
        assert block.tolist() == [[0, 0], [2, 2], [2, 2], [0, 0]]


def test_streams_and_devices_are_per_thread_and_the_way_back_makes_a_context_on_device_0():
    with pretending(devices=2):
        side = torch.cuda.Stream(1)
        with torch.cuda.stream(side):
            assert torch.cuda.current_device() == 1
            assert torch.cuda.current_stream() is side
        assert torch.cuda.current_stream(1) is torch.cuda.default_stream(1)
        assert CONTEXTS == {(1, "MainThread"): 1, (0, "MainThread"): 1}
        torch.cuda.set_device(1)
        CONTEXTS.clear()
        with torch.cuda.stream(side):
            pass
        assert not CONTEXTS


def test_events_of_time():
    with pretending() as counts:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        with pytest.raises(RuntimeError, match="Both events must be recorded"):
            start.elapsed_time(stop)
        stop.record()
        assert 0 <= start.elapsed_time(stop) < 1000
        torch.cuda.Event().record()
        assert counts.total("timing event") == 2


def test_everything_is_restored_also_after_an_error():
    names = ("is_available", "Stream", "Event", "stream", "synchronize", "set_device", "_lazy_init")
    before = [getattr(torch.cuda, name) for name in names]
    lock, start = threading.Lock, threading.Thread.start
    with pytest.raises(RuntimeError, match="CUDA is pretended already"), pretending(), pretending():
        pass
    assert [getattr(torch.cuda, name) for name in names] == before
    assert (threading.Lock, threading.Thread.start) == (lock, start)
    assert torch.empty(3).add(1).device.type == "cpu"
    assert not torch.__future__.get_swap_module_params_on_conversion()


def test_inference_mode_counts_like_no_grad():
    kernels = []
    for mode in (torch.no_grad, torch.inference_mode):
        with pretending() as counts, mode():
            model = small_switch().to("cuda")
            ids = torch.ones(2, 9, dtype=torch.int64, device="cuda")
            counts.reset()
            model(input_ids=ids, decoder_input_ids=ids)
            kernels.append(counts.by_name("kernel"))
    assert {name: number for name, number in kernels[1].items() if name != "detach_"} == kernels[0]


def test_a_switch_model_computes_and_writes_the_same_as_on_the_host(counts):
    plain = small_switch()
    ids = torch.randint(3, 400, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    settings = {"max_new_tokens": 8, "do_sample": False}
    model = copy.deepcopy(plain).to("cuda")
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert model.device == torch.device("cuda:0")
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": mask}
        on_cuda = {name: value.to("cuda") for name, value in inputs.items()}
        theirs = plain(**inputs, decoder_input_ids=ids[:, :5]).logits
        ours = model(**on_cuda, decoder_input_ids=ids[:, :5].to("cuda")).logits
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-6)
        assert torch.equal(model.generate(**on_cuda, **settings).cpu(), plain.generate(**inputs, **settings))
    assert torch.equal(model.to("cpu").lm_head.weight, plain.lm_head.weight)
