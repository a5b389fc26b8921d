"""The predictor that `make smoke` trains, deployed on a pretended CUDA device beside the bundled model."""

from pathlib import Path

import pytest
import torch

from data.models.model import load_model
from data.models.weights import BUNDLED
from runtime.engine.batch import ModelBatch, forward
from runtime.engine.engine import Engine
from tests.helpers.pretend_cuda import pretending

ROOT = Path(__file__).parents[3]
PREDICTOR = ROOT / "outputs" / "smoke" / "predictor"
pytestmark = pytest.mark.skipif(not PREDICTOR.exists(), reason="make smoke trains the predictor and runs this test")


def test_forecasts_are_the_networks_and_outputs_the_plain_models():
    plain = load_model(BUNDLED)
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if len(line) > 60]
    tokens = [plain.tokenizer(lines[i : i + 8], padding=True, return_tensors="pt") for i in (0, 8, 16)]
    batches = [ModelBatch.of(dict(each) | {"labels": each["input_ids"]}, plain.model.config) for each in tokens]
    with pretending(), Engine(BUNDLED, PREDICTOR, 8, 16, dtype="float32") as engine:
        outputs = list(engine.run(batches))
        assert engine.controller.fallbacks == {}
        ours = [output.logits.cpu() for output in outputs]
    prepared = [output.stats.preparation for output in outputs if output.stats.preparation]
    assert {preparation.forecast.source for preparation in prepared} == {"adaptive"}
    assert sum(preparation.moves for preparation in prepared) > 0
    for batch, logits in zip(batches, ours, strict=True):
        real = batch.decoder.mask
        expected = forward(plain.model, batch)[real]
        # groups are not padded to the plain model's size on a device, so small ones add up in another order
        torch.testing.assert_close(logits[real], expected, rtol=0, atol=1e-4)
        assert torch.equal(logits[real].argmax(-1), expected.argmax(-1))
