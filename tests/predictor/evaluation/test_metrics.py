"""Metrics on cases whose value is known."""

import numpy as np
import pytest
import torch

from predictor.evaluation.metrics import LayerMean, hot_recall, likeliest, load_tv, sampling_floor, token_top1
from predictor.training.calibration import fit_spread


def test_load_tv_is_zero_for_the_truth_and_one_for_its_opposite():
    load = torch.tensor([[4.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert load_tv(3 * load, load)[:2].tolist() == [0.0, 0.0]
    assert load_tv(load, load)[2].isnan()
    assert load_tv(torch.tensor([[0.0, 5, 0, 0]]), load[:1]).tolist() == [1.0]
    assert load_tv(torch.zeros(1, 4), load[:1]).tolist() == [0.75]  # no forecast counts as uniform


@pytest.mark.parametrize("top_k", [1, 4])
def test_the_sampling_floor_is_what_draws_of_different_experts_differ_by(top_k):
    generator = torch.Generator().manual_seed(0)
    popularity = torch.rand(16, generator=generator).log()
    noise = -(-torch.rand(60, 500, 16, generator=generator).log()).log()
    chosen = (popularity + noise).topk(top_k).indices  # K different experts for each of 500 tokens, 60 times
    loads = torch.stack([torch.bincount(draw.flatten(), minlength=16) for draw in chosen]).float()
    differ = load_tv(loads.mean(0).expand(60, 16), loads).mean()
    assert sampling_floor(loads.mean(0)[None] * 1.0, top_k).item() == pytest.approx(differ.item(), rel=0.05)


def test_hot_recall_counts_ties_as_hot():
    load = torch.tensor([[9.0, 5, 5, 1]])
    assert hot_recall(torch.tensor([[3.0, 0, 2, 1]]), load, hot=2).tolist() == [1.0]
    assert hot_recall(torch.tensor([[0.0, 0, 2, 3]]), load, hot=2).tolist() == [0.5]


def test_token_top1_leaves_padding_out():
    experts = torch.tensor([[[2, 1, -1, -1]]])[..., None]
    assert token_top1(torch.tensor([[[2, 0, 0, 0]]])[..., None], experts).tolist() == [0.5]


def test_with_top_k_the_share_of_a_tokens_experts_counts_in_any_order():
    experts = torch.tensor([[[[2, 1], [0, 3], [-1, -1]]]])
    assert token_top1(torch.tensor([[[[1, 2], [3, 5], [0, 1]]]]), experts).tolist() == [0.75]
    logits = torch.tensor([0.0, 3, 1, 2]).expand(1, 3, 1, 4)  # [B, T, L, E]
    assert likeliest(logits, 2)[0, 0, 0].tolist() == [1, 3]
    assert likeliest(logits, 1).shape == (1, 1, 3, 1)


def test_layer_mean_skips_layers_without_load():
    mean = LayerMean(2)
    mean.update(torch.tensor([1.0, torch.nan]))
    mean.update(torch.tensor([0.0, 4.0]))
    assert mean.compute().tolist() == [0.5, 4.0]


@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_fitted_spread_covers_new_batches(bias):
    """Counts that scatter by chance, and by a bias that grows with the load: 80 % intervals hold 75 to 85 %."""
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(32, 0.5), size=(120, 1))
    true = share * np.exp(bias * rng.normal(size=share.shape))
    truth = torch.from_numpy(np.stack([rng.multinomial(2000, row[0] / row[0].sum())[None] for row in true])).float()
    load = torch.from_numpy(share * 2000).float()
    variance = load * (1 - load / 2000)
    terms = torch.stack([variance, load**2, torch.rand(load.shape, generator=torch.Generator().manual_seed(0))], 1)
    weights = fit_spread(load[:60], terms[:60], truth[:60])[0]
    deviation = torch.einsum("s,nsle->nle", weights, terms[60:]).sqrt()
    covered = ((load[60:] - truth[60:]).abs() <= 1.2816 * deviation).float().mean()
    assert 0.75 <= float(covered) <= 0.85
