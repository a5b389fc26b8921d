"""The comparison with the plain model: what differs is counted, in bfloat16 route by route."""

import copy

import torch

from data.models.model import LoadedModel
from runtime.engine.engine import Engine
from runtime.infer.verify import Verifier
from tests.helpers.batches import batches


def checked(switch: LoadedModel, plain) -> list:
    with Engine(switch, None, 4, 4) as engine, Verifier(engine, plain) as verifier:
        given = batches()
        return [verifier.check(batch, output, "") for batch, output in zip(given, engine.run(given), strict=True)]


def test_a_flipped_router_is_counted_and_hooks_are_removed(switch):
    switch.model.to(torch.bfloat16)
    plain = copy.deepcopy(switch.model)
    same = checked(switch, plain)
    assert sum(check.flipped_routes for check in same) == 0
    assert [check.routes for check in same] == [check.tokens for check in same], "one MoE layer in each stack"
    assert {check.differing_tokens for check in same} == {0}
    router = plain.get_submodule(switch.layout.modules[0].removesuffix(".experts")).router.classifier
    with torch.no_grad():
        router.weight.neg_()
    other = checked(switch, plain)
    flipped = sum(check.flipped_routes for check in other)
    encoder = sum(batch.tokens.num_tokens for batch in batches())
    assert encoder / 2 < flipped <= sum(check.routes for check in other)
    for model in (switch.model, plain):
        assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("router"))


def test_float32_compares_logits_alone(switch):
    check = checked(switch, copy.deepcopy(switch.model))[0]
    assert check.logit_difference <= 1e-5
    assert (check.routes, check.flipped_routes, check.differing_tokens) == (0, 0, 0)


def test_without_a_plain_model_nothing_is_compared(switch):
    check = checked(switch, None)[0]
    assert (check.logit_difference, check.same_argmax, check.differing_tokens) == (None, None, None)
    assert 0 < check.contiguous <= check.oracle <= 1
