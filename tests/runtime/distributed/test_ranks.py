"""On several ranks outputs equal the unmodified model's under any plan, and a failure names the rank that caused it."""

import copy
import itertools
import os
import resource
import signal
import threading

import pytest
import torch

import runtime.engine.controller
from data.models.layout import MoELayout
from data.models.model import LoadedModel
from predictor.baselines.history import LastBatch
from runtime.distributed.ranks import Ranks
from runtime.engine.batch import ModelBatch
from runtime.engine.engine import Engine
from tests.conftest import small_switch
from tests.helpers.batches import batches, largest_difference, unusual
from tests.helpers.forecasters import Noise
from tests.helpers.planners import RandomPlanner
from tests.helpers.processes import on_ranks

SETTINGS = {"max_new_tokens": 14, "do_sample": False}


def model(seed: int = 0) -> LoadedModel:
    switch = small_switch(seed=seed)
    return LoadedModel(switch, None, MoELayout.from_model(switch, "random"))


def outputs(rank: int) -> dict[str, object]:
    """Differences from the unmodified model under several planners, its greedy text, and its weights afterwards."""
    switch = model()
    plain = copy.deepcopy(switch.model)
    found: dict[str, object] = {}
    for name, redundant in (("none", 0), ("noise", 8), ("random", 8), ("last", 8)):
        forecaster = {"noise": Noise(switch.layout), "last": LastBatch()}.get(name, Noise(switch.layout))
        with Engine(switch, forecaster if redundant else None, None, redundant) as engine:
            if name == "random":
                engine.controller.planner = RandomPlanner(engine.home)
            found[name] = largest_difference(engine, plain, unusual())
            found[f"{name} late"] = engine.controller.late
    for router in (plain.encoder.block[1].layer[1].mlp.router, switch.model.encoder.block[1].layer[1].mlp.router):
        router.classifier.weight.data.zero_()  # all tokens to expert 0
    with Engine(switch, LastBatch(), None, 8) as engine:
        found["one expert"] = largest_difference(engine, plain, unusual()[:8])
    found["text"] = same_text(switch, plain)
    found["restored"] = all(
        torch.equal(value, switch.model.state_dict()[name]) for name, value in plain.state_dict().items()
    )
    return found


def same_text(switch: LoadedModel, plain) -> bool:
    """Greedy text of rows that end at different steps, with plans that stay and plans that change."""
    tokens = unusual()[0].tokens
    written = plain.generate(input_ids=tokens.input_ids, attention_mask=tokens.mask.long(), **SETTINGS)
    settings = SETTINGS | {"eos_token_id": int(written[0, 5])}
    expected = plain.generate(input_ids=tokens.input_ids, attention_mask=tokens.mask.long(), **settings)
    alike = []
    with Engine(switch, Noise(switch.layout), None, 8) as engine:
        for replan_every in (None, 1, 3):
            rows = ModelBatch(tokens).rows(engine.ranks.rank, engine.ranks.world)
            ids = engine.generate(tokens, replan_every=replan_every, **settings)
            width = ids.shape[1]
            alike.append(torch.equal(ids, expected[rows][:, :width]) and not expected[rows][:, width:].any())
    return all(alike)


def unequal_outputs(rank: int) -> dict[str, object]:
    """Differences where 8 experts and 4 replica slots lie on 3 ranks, and homes of each rank."""
    switch = model()
    plain = copy.deepcopy(switch.model)
    with Engine(switch, Noise(switch.layout), None, 4) as engine:
        engine.controller.planner = RandomPlanner(engine.home)
        difference = largest_difference(engine, plain, unusual())
        return {"difference": difference, "homes": engine.home.is_home_slot[0].reshape(3, -1).sum(-1).tolist()}


def test_outputs_equal_where_experts_do_not_divide_over_the_ranks():
    for found in on_ranks(3, unequal_outputs):
        assert isinstance(found, dict), found
        assert found["difference"] <= 1e-5
        assert found["homes"] == [2, 3, 3]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_outputs_equal_the_unmodified_models_on_any_number_of_ranks(world):
    for rank, found in enumerate(on_ranks(world, outputs)):
        assert isinstance(found, dict), found
        for name in ("none", "noise", "random", "last", "one expert"):
            assert found[name] <= 1e-5, (rank, name, found)
        assert found["text"], rank
        assert found["restored"], rank


class Pupil(Noise):
    """Keeps what it is shown."""

    def __init__(self, layout):
        super().__init__(layout)
        self.seen = []

    def observe(self, upcoming, load, sequences=None):
        self.seen.append((upcoming.input_ids.tolist(), load.tolist(), sequences.tolist()))


def lessons(rank: int) -> list[object]:
    """What a forecaster was shown of batches of which some have fewer sequences than there are ranks."""
    switch = model()
    pupil, stream = Pupil(switch.layout), [*unusual(), *batches(3)]
    with Engine(switch, pupil, None, 16) as engine:
        for _ in engine.run(iter([*stream, stream[-1]])):
            engine.controller.commit(wait=True)  # nothing is late, so that every batch is shown
    return pupil.seen


def test_rank_0_learns_from_the_loads_of_all_ranks_sequences():
    alone, (shown, *others) = lessons(0), on_ranks(3, lessons)
    assert isinstance(shown, list), shown
    assert others == [[], []]
    assert len(alone) == len(unusual()) + 2  # the last two are followed by no forecast
    assert min(len(ids) for ids, _, _ in alone) < 3
    assert shown == alone


def two_hundred(rank: int) -> tuple[float, int]:
    """200 small batches under random plans: the largest difference, and the growth of memory after the first 50."""
    switch = model()
    plain, stream = copy.deepcopy(switch.model), batches(5) * 40
    with Engine(switch, Noise(switch.layout), None, 8) as engine:
        engine.controller.planner = RandomPlanner(engine.home, seed=1)
        worst = largest_difference(engine, plain, stream[:50])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        worst = max(worst, largest_difference(engine, plain, stream[50:]))
    return worst, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def test_two_hundred_batches_under_random_plans_neither_drift_nor_leak():
    for worst, grown_kib in on_ranks(2, two_hundred):
        assert worst <= 1e-5
        assert grown_kib < 8 << 10


def shards(rank: int, folder: str) -> tuple[list[int], int]:
    """Number of buffers of each layer, and of expert weights elsewhere in the model."""
    with Engine(folder, num_redundant_experts=4) as engine:
        list(engine.run(iter(batches(2))))
        held = [len(experts.slots.tensors[0]) for experts in engine.replicated.layers]
        return held, sum("expert_" in name for name, _ in engine.loaded.model.named_parameters())


def test_each_rank_reads_its_own_experts_only(switch_folder):
    assert on_ranks(2, shards, str(switch_folder)) == [([4 + 2 * 2] * 2, 0)] * 2


def killed(rank: int) -> str:
    switch = model()
    seen = 0
    try:
        with Engine(switch, Noise(switch.layout), None, 8, timeout_s=20) as engine:
            for _ in engine.run(iter(batches(40))):
                seen += 1
                if rank == 1 and seen == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
    except RuntimeError as error:
        return f"{seen} outputs, then {error}"
    return "no failure"


@pytest.mark.parametrize("world", [2, 4])
def test_all_other_ranks_name_a_rank_that_dies(world):
    results = on_ranks(world, killed, timeout_s=40)
    assert results.pop(1) is None
    for text in results:
        assert "rank 1 is lost" in text, results
        assert int(text.split()[0]) >= 3, "outputs before the loss are delivered"


def interrupted(rank: int) -> str:
    switch = model()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with SIGINT ignored
    try:
        with Engine(switch, Noise(switch.layout), None, 8) as engine:
            for number, _ in enumerate(engine.run(itertools.cycle(batches(20)))):
                if number == 2:  # kernels are compiled now; a terminal sends the signal to all ranks
                    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    except (KeyboardInterrupt, RuntimeError) as error:
        return type(error).__name__
    return "went on"


def test_an_interrupt_ends_all_ranks_within_seconds():
    results = on_ranks(2, interrupted, timeout_s=15)
    assert "KeyboardInterrupt" in results
    # None: it was waiting for the rank that served the store and had ended already, and its heartbeat ended it
    assert set(results) <= {"KeyboardInterrupt", "RankLostError", None}


def unlike(rank: int) -> str:
    switch = model(seed=rank)
    with Engine(switch, None, None, 0):
        return "started"


def test_ranks_with_other_models_are_refused():
    for text in on_ranks(2, unlike):
        assert text.startswith("ValueError: model is ")
        assert "on rank 0 and" in text
        assert text.endswith("on rank 1")


def lonely(rank: int) -> str:
    if rank == 1:
        return "never connected"
    with Engine(model(), None, None, 0, timeout_s=2):
        return "started"


def test_a_rank_that_never_connects_times_out():
    alone, _ = on_ranks(2, lonely, timeout_s=30)
    assert alone.startswith("RankLostError: 2 processes did not meet in 2 s"), alone


def opens(rank: int) -> None:
    with Ranks(timeout_s=10, device="cpu") as ranks:
        ranks.exchange("name", rank)
        if rank == 0:
            threading.Event().wait(0.5)  # rank 1 opens again meanwhile


def opens_twice(rank: int) -> str:
    opens(rank)
    opens(rank)
    return "met"


def test_a_rank_that_opens_again_before_rank_0_has_closed_waits_for_it():
    assert on_ranks(2, opens_twice, timeout_s=30) == ["met", "met"]


class LateStore:
    """A job's store that is read half a second late."""

    def __init__(self, store):
        self._store = store

    def __getattr__(self, name):
        return getattr(self._store, name)

    def get(self, key):
        threading.Event().wait(0.5)
        return self._store.get(key)


def one_predicts(rank: int) -> str:
    switch = model()
    with Engine(switch, None, None, 0) as engine:
        facts = {"model": "same"} if rank == 0 else {"model": "same", "predictor": "mine"}
        store = torch.distributed.PrefixStore("again", engine.ranks._store)
        engine.ranks._store = LateStore(store) if rank else store  # which ends with rank 0
        engine.ranks.check_alike(facts)
    return "started"


def test_a_fact_of_only_one_rank_is_refused():
    for text in on_ranks(2, one_predicts):
        assert text == "ValueError: predictor is None on rank 0 and mine on rank 1"


class Hangs:
    name = "hangs"

    def forecast(self, upcoming, history):
        threading.Event().wait()


class Raises:
    name = "raises"

    def forecast(self, upcoming, history):
        raise RuntimeError("no forecast today")


def without_forecast(rank: int, forecaster) -> tuple[float, int, int]:
    runtime.engine.controller.PATIENCE_S = 0.1
    switch = model()
    plain = copy.deepcopy(switch.model)
    with Engine(switch, forecaster, None, 8) as engine:
        worst = largest_difference(engine, plain, batches(6))
        return worst, engine.controller.late, sum(engine.controller.fallbacks.values())


def test_a_forecaster_that_hangs_is_waited_for_once(monkeypatch):
    waits = []
    monkeypatch.setattr(runtime.engine.controller, "wait_for", lambda futures, seconds: waits.append(seconds))
    with Engine(model(), Hangs(), 4, 8) as engine:
        for _ in range(3):
            list(engine.run(iter(batches(2))))
    assert len(waits) == 1


def test_a_forecaster_that_hangs_delays_no_rank():
    for worst, late, _ in on_ranks(2, without_forecast, Hangs()):
        assert worst <= 1e-5
        assert late == 6


def test_a_forecaster_that_raises_is_replaced_on_the_rank_that_forecasts():
    (worst, _, fallbacks), (other, _, none) = on_ranks(2, without_forecast, Raises())
    assert max(worst, other) <= 1e-5
    assert fallbacks > 0
    assert none == 0


def test_devices_must_be_as_many_as_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="8 devices, but 2 processes run: leave the number of devices out, or start 8"):
        Engine(model(), None, 8, 0)
