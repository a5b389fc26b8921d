"""A pytest plugin: transformers' own tests run with an engine around every call and generation of a model.

    pytest -p benchmarks.support.in_engine --engine-report FILE tests/models/mixtral/test_modeling_mixtral.py

Every call of a causal language model in evaluation mode opens an `Engine` on it with two devices, places replicas by a
random forecast, and then runs as the test asked. Where the call can be repeated (it is given no cache), its logits are
compared with the plain model's. A test that an engine never ran in does not count: the report says which did.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from data.models.model import LoadedModel
from predictor.forecast import LoadForecast, LoadHistory
from runtime import Engine
from runtime.experts.layer import ReplicatedExperts

DEVICES = 2


class RandomForecaster:
    """Forecasts loads that have nothing to do with the batch.

    Args:
        layers: L.
        experts: E.
    """

    name = "random"

    def __init__(self, layers: int, experts: int) -> None:
        self._shape, self._random = (layers, experts), np.random.default_rng(0)

    def forecast(self, upcoming: Any, history: LoadHistory) -> LoadForecast:
        """A forecast of 1,000 tokens a layer."""
        share = self._random.dirichlet(np.full(self._shape[1], 0.3), self._shape[0])
        return LoadForecast(share, np.full(self._shape[0], 1e3), np.zeros(self._shape), len(history), self.name)


class InEngine:
    """Wraps models' calls, and counts what ran."""

    def __init__(self) -> None:
        self.test = ""
        self.ran: dict[str, int] = {}
        self.largest_difference = 0.0
        self.compared = self.moves = self.layers = 0
        self._inside = False

    @contextmanager
    def engine(self, model: Any) -> Iterator[bool]:
        """An engine around the model with replicas in place; False if the call is not one that an engine serves."""
        if self._inside or not isinstance(model, GenerationMixin) or model.training:
            yield False
            return
        loaded = LoadedModel.of(model)
        layout = loaded.layout
        redundant = DEVICES + layout.num_experts % DEVICES
        forecaster = RandomForecaster(layout.num_layers, layout.num_experts)
        self._inside = True
        try:
            with Engine(loaded, forecaster, num_devices=DEVICES, num_redundant_experts=redundant) as engine:
                engine.controller.prepare(None)
                preparation = engine.controller.commit(wait=True)
                assert preparation is not None
                engine.replicated.follow_plan()
                self.moves += preparation.moves
                self.ran[self.test] = self.ran.get(self.test, 0) + 1
                yield True
        finally:
            self._inside = False

    def call(self, plain: Callable[..., Any], model: Any, *inputs: Any, **settings: Any) -> Any:
        """Calls a model within an engine, and compares the logits where the call can be repeated."""
        repeatable = "past_key_values" not in settings and not torch.is_grad_enabled()
        with self.engine(model) as inside:
            output = plain(model, *inputs, **settings)
        if inside and repeatable and isinstance(getattr(output, "logits", None), Tensor):
            self._inside = True
            expected = plain(model, *inputs, **settings).logits
            self._inside = False
            if output.logits.dtype == torch.float32 and expected.isfinite().all():
                self.compared += 1
                self.largest_difference = max(self.largest_difference, float((output.logits - expected).abs().max()))
        return output

    def generate(self, plain: Callable[..., Any], model: Any, *inputs: Any, **settings: Any) -> Any:
        """Generates within an engine."""
        with self.engine(model):
            return plain(model, *inputs, **settings)

    def layer(self, compute: Callable[..., Tensor], layer: ReplicatedExperts, *inputs: Any) -> Tensor:
        """Counts the MoE layers that slots computed."""
        self.layers += 1
        return compute(layer, *inputs)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the report's option."""
    parser.addoption("--engine-report", type=Path, help="file for what ran within an engine, JSON")


@pytest.fixture(autouse=True)
def in_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wraps all models for one test."""
    around: InEngine = request.config.stash[STASH]
    around.test = request.node.name
    plain, generate = nn.Module.__call__, GenerationMixin.generate
    monkeypatch.setattr(
        PreTrainedModel, "__call__", lambda model, *a, **s: around.call(plain, model, *a, **s), raising=False
    )
    compute = ReplicatedExperts.compute
    monkeypatch.setattr(ReplicatedExperts, "compute", lambda layer, *a: around.layer(compute, layer, *a))
    monkeypatch.setattr(GenerationMixin, "generate", lambda model, *a, **s: around.generate(generate, model, *a, **s))


def pytest_configure(config: pytest.Config) -> None:
    """Starts counting."""
    config.stash[STASH] = InEngine()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the report."""
    around, path = session.config.stash[STASH], session.config.getoption("engine_report")
    if path is not None:
        facts = {
            "tests": len(around.ran), "calls": sum(around.ran.values()), "moves": around.moves,
            "layers": around.layers, "compared": around.compared,
            "largest_difference": around.largest_difference, "ran": around.ran,
        }  # fmt: skip
        Path(path).write_text(json.dumps(facts))


STASH = pytest.StashKey[InEngine]()
