"""The cells and heads against plain formulas, and what must hold for any network."""

import numpy as np
import pytest
import torch

from predictor.layers import SparseAttention, sparsemax
from predictor.network import Architecture, LoadNetwork, capped
from predictor.recurrence import SRULayer, _sigmoid, unrolled

ARCHITECTURES = [
    Architecture(width=8, history=True),
    Architecture(width=8, bidirectional=False, sparse_attention=True, history=False),
    Architecture(cell="lstm", width=8, sparse_attention=True),
    Architecture(cell="lstm", width=8, depth=1),
]


def test_sru_follows_its_equations():
    torch.manual_seed(0)
    layer, width = SRULayer(4, bidirectional=False), 4
    with torch.no_grad():
        layer.peephole.normal_()
    x = torch.randn(1, 5, width)
    weight, bias = layer.project.weight, layer.project.bias
    state, expected = torch.zeros(width), []
    for step in x[0]:
        candidate = weight[:width] @ step + bias[:width]
        forget = torch.sigmoid(weight[width : 2 * width] @ step + bias[width : 2 * width] + layer.peephole[0] * state)
        reset = torch.sigmoid(weight[2 * width :] @ step + bias[2 * width :] + layer.peephole[1] * state)
        state = forget * state + (1 - forget) * candidate
        expected.append(reset * state + (1 - reset) * layer.scale * step)
    assert torch.allclose(
        layer(x[0, :, None], torch.ones(5, 1, dtype=torch.bool))[:, 0], torch.stack(expected), atol=1e-6
    )


def test_half_of_a_bidirectional_sru_reads_backwards():
    torch.manual_seed(0)
    layer, mask = SRULayer(4, bidirectional=True), torch.ones(6, 1, dtype=torch.bool)
    x = torch.randn(6, 1, 4)
    changed = x.clone()
    changed[3] += 1
    moved = (layer(x, mask) != layer(changed, mask))[:, 0]
    assert moved[:3, :2].logical_not().all()
    assert moved[4:, :2].all()
    assert moved[:3, 2:].all()
    assert moved[4:, 2:].logical_not().all()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_compiled_recurrence_equals_the_unrolled_one_and_so_do_its_gradients(bidirectional, monkeypatch):
    torch.manual_seed(0)
    layer, mask = SRULayer(40, bidirectional), torch.arange(23)[:, None] < torch.tensor([23, 17, 1])
    with torch.no_grad():
        layer.peephole.normal_()
    x, weight = torch.randn(23, 3, 40, requires_grad=True), torch.randn(23, 3, 40)

    def run():
        out = layer(x, mask)
        return out, *torch.autograd.grad((out * weight).sum(), (x, *layer.parameters()))

    compiled = run()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    for value, expected in zip(compiled, run(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=2e-5)


def test_unrolled_recurrence_runs_in_float64_and_its_gradient_is_right():
    torch.manual_seed(0)
    shapes = (4, 2, 3, 2, 3), (4, 2, 2, 3), (2, 2, 3)
    projected, x, peephole = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0]]).double()
    assert torch.autograd.gradcheck(unrolled, (projected, x, mask, peephole, 1.7))


def test_compiled_sigmoid_is_exact_to_float32():
    values = np.concatenate([np.linspace(-120, 120, 100_001), [-np.inf, np.inf]]).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = 1 / (1 + np.exp(-values.astype(np.float64)))
    exponents = np.empty(len(values), np.int32)
    _sigmoid(values, exponents, exponents.view(np.float32))
    assert np.allclose(values, expected, rtol=2e-7, atol=1e-34)


def test_sparsemax_known_values():
    assert torch.allclose(sparsemax(torch.tensor([0.1, 1.1, 0.2])), torch.tensor([0.0, 0.95, 0.05]))
    assert torch.allclose(sparsemax(torch.tensor([3.0, 1.0, -1.0])), torch.tensor([1.0, 0.0, 0.0]))
    weights = sparsemax(torch.randn(50, 20, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(weights.sum(-1), torch.ones(50))
    assert (weights == 0).float().mean() > 0.5


def test_sparse_attention_ignores_padding():
    torch.manual_seed(0)
    attention, x = SparseAttention(4), torch.randn(1, 5, 4)
    mask = torch.tensor([[True, True, True, False, False]])
    assert torch.allclose(attention(x, mask)[:, :3], attention(x[:, :3], mask[:, :3]), atol=1e-6)


def test_capped_is_the_expected_value():
    rng = np.random.default_rng(0)
    for probability in (0.05, 0.2, 0.4):
        counts = rng.binomial(60, probability, 200_000)
        mean, variance = torch.tensor(60 * probability), torch.tensor(60 * probability * (1 - probability))
        assert float(capped(mean, variance, 16)) == pytest.approx(np.minimum(counts, 16).mean(), abs=0.05)


@pytest.mark.parametrize(
    "architecture", ARCHITECTURES, ids=lambda a: a.cell + ("-sparse" if a.sparse_attention else "")
)
def test_more_padding_and_other_order_change_nothing(architecture, layout, upcoming):
    torch.manual_seed(0)
    network = LoadNetwork(layout, architecture).eval()
    ids, mask = upcoming.input_ids, upcoming.mask
    x = torch.randn(60, layout.d_model)[ids]
    none = torch.zeros(0, layout.num_layers, layout.num_experts)
    plain = network(x, mask, none)
    wide = network(torch.nn.functional.pad(x, (0, 0, 0, 5), value=3.0), torch.nn.functional.pad(mask, (0, 5)), none)
    turned = network(x.flip(0), mask.flip(0), none)
    assert torch.allclose(plain.load, wide.load, atol=1e-4)
    assert torch.allclose(plain.load, turned.load, atol=1e-4)
    assert plain.load.shape == (layout.num_layers, layout.num_experts)


def test_load_is_the_capped_sum_of_token_probabilities(layout):
    network = LoadNetwork(layout, Architecture(width=8, history=False)).eval()
    with torch.no_grad():  # every token goes to expert 3: one sequence of 10, capacity 6, another of 4
        network.encoder_heads.weight.zero_()
        network.encoder_heads.bias.copy_(torch.eye(layout.num_experts)[3].repeat(2) * 50)
    mask = torch.arange(10) < torch.tensor([[10], [4]])
    load = network(torch.zeros(2, 10, layout.d_model), mask, torch.zeros(0, 3, layout.num_experts)).load
    assert load[0, 3].item() == pytest.approx(10.0, abs=1e-2)
    assert load[:2].sum().item() == pytest.approx(20.0, abs=1e-2)


def test_history_takes_over_where_it_is_trusted(layout, upcoming):
    network = LoadNetwork(layout, Architecture(width=8, history=True)).eval()
    with torch.no_grad():
        network.history.trust_logits.fill_(20.0)
        network.history.rate_logits[:, 0] = 20.0  # the last batch alone
    past = torch.zeros(3, layout.num_layers, layout.num_experts)
    past[-1, :, 5] = 7.0
    load = network(torch.zeros(*upcoming.mask.shape, layout.d_model), upcoming.mask, past).load
    assert torch.allclose(load / load.sum(-1, keepdim=True), past[-1] / 7, atol=1e-4)


def test_architecture_refuses_nonsense():
    with pytest.raises(ValueError, match="cell is 'rnn', expected"):
        Architecture(cell="rnn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width is 7, expected an even number"):
        Architecture(width=7)
    for wrong in ({"depth": 2**31}, {"width": 0}, {"width": 8.0}):
        with pytest.raises(ValueError, match=r"expected a whole number, \d+ to \d+"):
            Architecture(**wrong)


def test_gradients_reach_every_parameter(layout, upcoming):
    """Plain DDP needs it, with and without a history."""
    for past in (torch.zeros(0, 3, layout.num_experts), torch.ones(2, 3, layout.num_experts)):
        network = LoadNetwork(layout, Architecture(width=8, sparse_attention=True, history=True))
        prediction = network(torch.randn(*upcoming.mask.shape, layout.d_model), upcoming.mask, past)
        (prediction.load.square().sum() + network.history.share(past).square().sum()).backward()
        assert [name for name, value in network.named_parameters() if value.grad is None] == []


def test_exported_network_says_the_same_for_any_batch_size(layout, upcoming):
    torch.manual_seed(0)
    network = LoadNetwork(layout, Architecture(width=8, sparse_attention=True)).eval()
    inputs = torch.randn(*upcoming.mask.shape, layout.d_model), upcoming.mask, torch.ones(4, 3, layout.num_experts)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(network, inputs, dynamic_shapes=({0: batch}, {0: batch}, None)).module()
        other = torch.randn(9, *inputs[0].shape[1:]), inputs[1][torch.arange(9) % 6], inputs[2]
        for case in (inputs, other):
            for exported, eager in zip(program(*case), network(*case), strict=True):
                assert torch.allclose(exported, eager, atol=1e-6)


def test_decoder_load_may_differ_between_tokens_of_a_sequence(layout):
    """A token that brings about decoder tokens of expert 2, and one that brings about none."""
    network = LoadNetwork(layout, Architecture(width=2, depth=1, bidirectional=False, history=False)).eval()
    hidden = torch.tensor([[[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]])
    with torch.no_grad():
        network.decoder_length.weight.copy_(torch.tensor([[1.0, -9.0]]))
        network.decoder_length.bias.zero_()
        network.decoder_heads.weight.zero_()
        network.decoder_heads.weight[2, 0] = 9.0
    for length, expected in ((3, 2.0), (2, 1.0)):
        load, _ = network._decoder_load(hidden, torch.arange(3)[None] < length)
        assert load[0, 0, 2].item() / torch.nn.functional.softplus(torch.tensor(9.0)).item() == pytest.approx(
            min(expected, layout.expert_capacity / 9), rel=0.02
        )


@pytest.mark.parametrize(
    "architecture", ARCHITECTURES, ids=lambda a: a.cell + ("-sparse" if a.sparse_attention else "")
)
def test_mixed_precision_rounds_products_alone(architecture, layout, upcoming):
    torch.manual_seed(0)
    network = LoadNetwork(layout, architecture)
    inputs = torch.randn(*upcoming.mask.shape, layout.d_model), upcoming.mask, torch.ones(4, 3, layout.num_experts)
    exact = network(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network(*inputs)
    assert mixed.load.dtype == torch.float32
    assert not torch.equal(mixed.load, exact.load)
    assert torch.allclose(mixed.load, exact.load, rtol=0.05, atol=0.05)
    assert mixed.load[:2].sum(-1).allclose(exact.load[:2].sum(-1), rtol=1e-3)
    mixed.load.square().sum().backward()
