"""What one MoE layer asks of a GPU that is one rank of eight: the counts that docs/gpu.md shows."""

import numpy as np
import pytest
import torch

from data.models.expert import ExpertFormat
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.distributed.ranks import Ranks
from runtime.experts.grouped_mm import ExpertFunction
from runtime.experts.layer import ReplicatedExperts
from runtime.experts.slots import ResidentSlots
from tests.helpers.cuda_requests import COUNTS
from tests.helpers.fake_ranks import on_fake_ranks

WORLD, EXPERTS, REDUNDANT, WIDTH = 8, 64, 16, 32


def layer_of(rank: int, tokens: int, dtype: torch.dtype):
    """Counts of one call, after one at which the layer was warm."""
    torch.manual_seed(0)
    home = ReplicationPlan.at_home(contiguous_homes(1, EXPERTS), WORLD, REDUNDANT)
    phy2log = home.phy2log[0].copy()
    phy2log[~home.is_home_slot[0]] = np.arange(REDUNDANT) + EXPERTS // 2
    with Ranks() as ranks, torch.no_grad():
        like = torch.empty(1, dtype=dtype, device=ranks.device)
        function = ExpertFunction(ExpertFormat.plain(48, WIDTH), torch.nn.ReLU())
        slots = ResidentSlots(home, 0, range(rank, rank + 1), function, like)
        layer = ReplicatedExperts(slots, phy2log, ranks, WORLD)
        expert = (2 * torch.arange(tokens) + torch.arange(tokens) // 32) % EXPERTS
        one_hot = torch.nn.functional.one_hot(expert, EXPERTS)[:, None].to(ranks.device)
        inputs = (
            torch.randn(tokens, WIDTH).to(ranks.device, dtype),
            one_hot,
            torch.rand(tokens, 1).to(ranks.device, dtype),
        )
        layer.begin(phy2log, torch.zeros(tokens, dtype=torch.bool).to(ranks.device), measure=False)
        layer(*inputs)
        COUNTS.reset()
        layer(*inputs)
        return COUNTS.snapshot()


@pytest.mark.parametrize(
    ("tokens", "dtype", "kernels"), [(2048, torch.bfloat16, 23), (32, torch.bfloat16, 23), (2048, torch.float32, 42)]
)
def test_a_layer_of_a_rank_of_eight(tokens, dtype, kernels):
    for log in on_fake_ranks(WORLD, lambda rank: layer_of(rank, tokens, dtype)):
        counts = log.result
        asked = {kind: counts.total(kind) for kind in ("upload", "collective", "sync", "timing event")}
        assert counts.total("kernel", site="runtime/experts/") == kernels, str(counts)
        assert asked == {"upload": 1, "collective": 3, "sync": 1, "timing event": 0}, str(counts)
