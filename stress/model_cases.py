"""Random cases of whole models: an engine's logits and greedy text against the unmodified model's.

Models are tiny and random: Switch, and the decoder-only families of docs/models.md. On several ranks all ranks must run
the same cases.
"""

import copy
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.models.model import LoadedModel
from data.models.stored_experts import stored_experts
from data.models.weights import ModelWeights
from data.traces.trace import TokenBatch, pad_tokens
from predictor.baselines.history import LastBatch
from runtime.distributed.ranks import Ranks
from runtime.engine.batch import ModelBatch, forward
from runtime.engine.engine import Engine
from runtime.offload.cache import LOADERS
from runtime.offload.expert_files import ExpertFiles
from runtime.offload.memory import PAGE
from stress.cases import Case, one_of
from stress.layers import Found
from stress.plain_loop import LIMITS, difference
from tests.conftest import small_switch, write_switch
from tests.helpers.families import FAMILIES, VOCABULARY, tiny
from tests.helpers.forecasters import Noise
from tests.helpers.planners import RandomPlanner

SWITCH = "switch"


@dataclass(frozen=True)
class ModelCase(Case):
    """A model, how an engine runs it, and some batches.

    Attributes:
        world: Ranks.
        family: Of the model.
        devices: G; with several ranks as many as ranks.
        spare: Replica slots of a device.
        forecast: What is forecast.
        random_plans: Whether plans are drawn at random instead of following the forecast.
        max_moves: Most moves before a batch; -1 sets no limit.
        price: Tokens that an active expert counts as.
        random_homes: Whether homes lie in a random order.
        budget: Experts that fit into memory; 0 keeps all.
        sequences: Sequences of a batch, at most.
        length: Tokens of a sequence, at most.
        padding: Where sequences are padded.
        blank: Whether a sequence holds nothing but padding.
        steps: Batches.
        written: Tokens generated after each batch; 0 generates none.
        replan_every: Steps between two plans in generation; 0 keeps the plan.
    """

    world: int = one_of(1, 2, 4)
    family: str = one_of(SWITCH, SWITCH, SWITCH, *FAMILIES)
    devices: int = one_of(1, 2, 4, 4, 8)
    spare: int = one_of(0, 1, 2)
    forecast: str = one_of("none", "noise", "noise", "last")
    random_plans: int = one_of(0, 1, 1)
    max_moves: int = one_of(-1, -1, 0, 3)
    price: int = one_of(0, 0, 1, 20)
    random_homes: int = one_of(0, 1)
    budget: int = one_of(0, 0, 0, 1, 4, 12)
    sequences: int = one_of(1, 2, 3, 6)
    length: int = one_of(1, 2, 9, 20, 50)
    padding: str = one_of("right", "left")
    blank: int = one_of(0, 0, 0, 1)
    steps: int = one_of(1, 4, 8, 8)
    written: int = one_of(0, 0, 4)
    replan_every: int = one_of(0, 1, 2)

    @property
    def possible(self) -> bool:
        """Whether the engine takes these values."""
        return (
            (self.world == 1 or self.devices == self.world)
            and (self.budget == 0 or (self.devices == self.world and (self.world > 1 or self.spare == 0)))
            and (self.sequences > 1 or not self.blank)
        )


@cache
def model_of(family: str) -> tuple[LoadedModel, Any]:
    """The model that engines run, and another one that stays as it is."""
    model = small_switch() if family == SWITCH else tiny(family)
    return LoadedModel.of(model), copy.deepcopy(model)


FOLDERS = tempfile.TemporaryDirectory(prefix="switchcast-stress-")
"""The folders of models, removed when the process ends."""


@cache
def folder_of(family: str) -> tuple[str, int, int]:
    """The model's folder, bytes of one expert's buffer, and bytes besides."""
    folder = Path(FOLDERS.name, family)
    write_switch(folder)
    if family != SWITCH:
        tiny(family).save_pretrained(folder)
    loaded = model_of(family)[0]
    files = ExpertFiles(
        stored_experts(ModelWeights(str(folder)), loaded.model, loaded.layout), loaded.layout, torch.float32
    )
    files.close()
    return str(folder), files.shape.padded_bytes, LOADERS * files.reader_bytes + PAGE


def run_model_case(case: ModelCase, ranks: Ranks) -> Found:
    """Runs a case on this rank.

    Raises:
        AssertionError: If logits, text or counts differ from the plain model's.
    """
    rng, (loaded, plain) = np.random.default_rng(case.seed), model_of(case.family)
    layout, found = loaded.layout, Found(0, 0, {"float32": 0.0})
    forecaster = {"none": None, "noise": Noise(layout), "last": LastBatch()}[case.forecast]
    shape = layout.num_layers, layout.num_experts
    homes = rng.permuted(np.tile(np.arange(shape[1]), (shape[0], 1)), axis=1) if case.random_homes else None
    options: dict[str, Any] = {
        "max_moves": None if case.max_moves < 0 else case.max_moves, "expert_overhead_tokens": case.price,
        "homes": homes,
    }  # fmt: skip
    model: Any = loaded
    if case.budget:
        model, expert, besides = folder_of(case.family)
        options["device_memory"] = case.budget * expert + besides
    with Engine(model, forecaster, case.devices, case.spare * case.devices, timeout_s=120.0, **options) as engine:
        if case.random_plans:
            engine.controller.planner = RandomPlanner(engine.home, case.seed)
        batches = [_batch(case, rng) for _ in range(case.steps)]
        for batch, output in zip(batches, engine.run(batches), strict=True):
            decoder = batch.decoder or batch.tokens
            real = decoder.mask[output.rows]
            theirs = forward(plain, batch)[output.rows][real]
            _note(found, output.logits[real], theirs)
            assert output.stats.device_load.sum() == output.stats.load.sum(), "tokens are counted twice or not at all"
            found.moved += output.stats.preparation is not None and output.stats.preparation.moves > 0
            if case.written and not (case.blank and layout.causal):  # attention to nothing has no right value
                _compare_text(case, engine, plain, batch.tokens)
                found.compared += 1
                found.equal += 1
    return found


def _note(found: Found, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    worst = difference(ours, theirs)
    found.largest["float32"] = max(found.largest["float32"], worst)
    assert worst <= LIMITS[torch.float32], f"logits differ by {worst:.2g} of the largest"
    found.compared += 1
    found.equal += torch.equal(ours, theirs)


def _compare_text(case: ModelCase, engine: Engine, plain: Any, tokens: TokenBatch) -> None:
    settings = {"max_new_tokens": case.written, "do_sample": False}
    expected = plain.generate(input_ids=tokens.input_ids, attention_mask=tokens.mask.long(), **settings)
    ids = engine.generate(tokens, replan_every=case.replan_every or None, **settings)
    own = expected[ModelBatch(tokens).rows(engine.ranks.rank, engine.ranks.world)]
    width = ids.shape[1]
    assert torch.equal(ids, own[:, :width]), f"text is {ids.tolist()}, expected {own.tolist()}"


def _batch(case: ModelCase, rng: np.random.Generator) -> ModelBatch:
    """Ragged sequences, padded on one side."""
    vocabulary = 400 if case.family == SWITCH else VOCABULARY
    size = int(rng.integers(1, case.sequences + 1))

    def rows(longest: int) -> TokenBatch:
        return pad_tokens([rng.integers(3, vocabulary, rng.integers(1, longest + 1)) for _ in range(size)], pad=0)

    tokens = rows(case.length)
    if case.padding == "left":
        flip = torch.arange(tokens.mask.shape[1] - 1, -1, -1)
        tokens = TokenBatch(tokens.input_ids[:, flip], tokens.mask[:, flip])
    if case.blank and size > 1:
        tokens.mask[0] = False
    return ModelBatch(tokens, rows(max(case.length // 2, 1)) if case.family == SWITCH else None)
