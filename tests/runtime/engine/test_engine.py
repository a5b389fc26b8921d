"""Answers never change: the engine against the plain model with every kind of forecast, and plain again afterwards."""

import copy
import threading

import numpy as np
import pytest
import torch

from data.models.layout import MoELayout
from data.models.model import LoadedModel
from data.traces.trace import TokenBatch, pad_tokens
from runtime.engine.batch import ModelBatch, forward
from runtime.engine.engine import Engine
from tests.conftest import small_switch
from tests.helpers.batches import batches, blank_rows
from tests.helpers.forecasters import Broken, Noise, Scribbler

DEVICES, REDUNDANT = 4, 8


def assert_answers_unchanged(engine: Engine) -> list:
    plain = copy.deepcopy(engine.loaded.model)
    with engine:
        outputs = list(engine.run(iter(batches())))
    for batch, output in zip(batches(), outputs, strict=True):
        real = batch.decoder.mask
        torch.testing.assert_close(output.logits[real], forward(plain, batch)[real], rtol=0, atol=1e-5)
    return outputs


def test_answers_stay_while_replicas_move(switch):
    outputs = assert_answers_unchanged(Engine(switch, Noise(switch.layout), DEVICES, REDUNDANT))
    assert sum(output.stats.preparation.moves for output in outputs if output.stats.preparation) > 0
    for output in outputs:
        assert (output.stats.device_load.sum(-1) == output.stats.load.sum(-1)).all()


@pytest.mark.parametrize(("devices", "redundant"), [(6, 8), (9, 8), (72, 8)])
def test_answers_stay_where_experts_do_not_divide_over_devices(devices, redundant):
    model = small_switch(num_experts=64, seed=1)
    switch = LoadedModel(model, None, MoELayout.from_model(model, "random"))
    engine = Engine(switch, Noise(switch.layout), devices, redundant)
    outputs = assert_answers_unchanged(engine)
    assert sum(output.stats.preparation.moves for output in outputs if output.stats.preparation) > 0
    assert (engine.replicated.transfer.plan.homes == engine.home.homes).all()
    for output in outputs:
        assert output.stats.device_load.shape[-1] == devices
        assert (output.stats.device_load.sum(-1) == output.stats.load.sum(-1)).all()


def test_copies_stay_on_the_node_of_their_group(switch):
    engine = Engine(switch, Noise(switch.layout), 4, 4, devices_per_node=2, num_groups=4)
    outputs = assert_answers_unchanged(engine)
    assert sum(output.stats.preparation.moves for output in outputs if output.stats.preparation) > 0
    assert engine.controller.fallbacks.total() == 0
    halves = engine.replicated.transfer.plan.phy2log.reshape(-1, 2, 6)
    assert all(set(first) <= {-1, 0, 1, 2, 3} and set(second) <= {-1, 4, 5, 6, 7} for first, second in halves)
    assert engine.replicated.between_nodes is None, "one process has no links"
    order = np.tile([0, 2, 4, 6, 1, 3, 5, 7], (switch.layout.num_layers, 1))
    with pytest.raises(ValueError, match="layer 0: expert 1 of group 0 is on node 1"):
        Engine(switch, None, 4, 4, devices_per_node=2, num_groups=4, homes=order)


@pytest.mark.parametrize("price", [50, "auto"])
def test_answers_stay_while_a_split_counts_the_price_of_an_expert(switch, price):
    engine = Engine(switch, Noise(switch.layout), DEVICES, REDUNDANT, expert_overhead_tokens=price)
    outputs = assert_answers_unchanged(engine)
    assert sum(output.stats.preparation.moves for output in outputs if output.stats.preparation) > 0
    found = engine.replicated.expert_overhead_tokens
    assert found == price if price != "auto" else 0 <= found < 64
    assert {layer.expert_overhead_tokens for layer in engine.replicated.layers} == {found}
    assert engine.controller.planner.expert_overhead_tokens == found


def test_within_a_memory_budget_an_expert_has_no_measured_price(switch_folder):
    for price, used in (("auto", 0), (7, 7)):
        with Engine(switch_folder, device_memory="1MiB", expert_overhead_tokens=price) as engine:
            assert engine.replicated.expert_overhead_tokens == used


def test_without_forecaster_nothing_moves(switch):
    outputs = assert_answers_unchanged(Engine(switch, None, DEVICES, 0))
    assert all(output.stats.preparation is None for output in outputs)


@pytest.mark.parametrize("how", ["raises", "nan", "other layout"])
def test_a_broken_forecaster_falls_back_on_past_loads_and_says_so_once(switch, how, caplog):
    engine = Engine(switch, Broken(how), DEVICES, REDUNDANT)
    outputs = assert_answers_unchanged(engine)
    late, fallbacks = engine.controller.late, sum(engine.controller.fallbacks.values())
    assert (
        len(outputs) - late <= fallbacks <= len(outputs)
    )  # a late preparation stands for the next batch's, if one is left
    assert [record.message for record in caplog.records if "past loads take its place" in record.message] == [
        caplog.records[0].message
    ]
    sources = {output.stats.preparation.forecast.source for output in outputs[2:] if output.stats.preparation.forecast}
    assert sources == {"ema"}


def test_a_late_preparation_is_left_for_the_next_boundary(switch):
    engine = Engine(switch, Noise(switch.layout), DEVICES, REDUNDANT)
    with engine:
        kind = type(engine.replicated.transfer)
        kind.arrived, arrived = property(lambda self: False), kind.arrived
        try:
            engine.controller.prepare(batches()[0].tokens)
            assert engine.controller.commit() is None
            assert engine.controller.late == 1
            assert engine.replicated.transfer.plan is engine.home
        finally:
            kind.arrived = arrived
        assert engine.controller.commit(wait=True) is not None


def test_the_plain_model_comes_back_bit_for_bit(switch):
    before = {name: value.clone() for name, value in switch.model.state_dict().items()}
    batch = batches(1)[0]
    with torch.inference_mode():
        expected = forward(switch.model, batch)
    assert_answers_unchanged(Engine(switch, Noise(switch.layout), DEVICES, REDUNDANT))
    assert list(switch.model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in switch.model.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(forward(switch.model, batch), expected)


def test_greedy_text_is_identical(switch):
    tokens = batches(1)[0].tokens
    settings = {"max_new_tokens": 12, "do_sample": False}
    plain = switch.model.generate(input_ids=tokens.input_ids, attention_mask=tokens.mask.long(), **settings)
    with Engine(switch, Noise(switch.layout), DEVICES, REDUNDANT) as engine:
        for _ in range(3):
            assert torch.equal(engine.generate(tokens, **settings), plain)


@pytest.mark.parametrize("redundant", [0, REDUNDANT])
def test_padding_that_a_decoder_reads_is_computed(switch, redundant):
    batch, plain = blank_rows(), copy.deepcopy(switch.model)
    settings = {"max_new_tokens": 12, "do_sample": False}
    with Engine(switch, None, DEVICES, redundant) as engine:
        (output,) = engine.run([batch])
        written = engine.generate(batch.tokens, **settings)
    real = batch.decoder.mask
    torch.testing.assert_close(output.logits[real], forward(plain, batch)[real], rtol=0, atol=1e-5)
    ids, mask = batch.tokens.input_ids, batch.tokens.mask.long()
    assert torch.equal(written, plain.generate(input_ids=ids, attention_mask=mask, **settings))


def test_batches_that_are_none_are_refused():
    with pytest.raises(TypeError, match=r"got a str, expected what a tokenizer returns: a mapping"):
        ModelBatch("a text")
    with pytest.raises(ValueError, match="2 sequences, but decoder tokens of 1"):
        ModelBatch(TokenBatch(torch.zeros(2, 3).long(), torch.ones(2, 3).bool()), pad_tokens([np.array([0])], pad=0))


def test_a_forecaster_that_writes_to_its_tokens_changes_nothing(switch):
    assert_answers_unchanged(Engine(switch, Scribbler(switch.layout), DEVICES, REDUNDANT))


def test_several_texts_for_a_sequence(switch):
    tokens = batches(1)[0].tokens
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    plain = switch.model.generate(input_ids=tokens.input_ids, attention_mask=tokens.mask.long(), **settings)
    with Engine(switch, Noise(switch.layout), DEVICES, REDUNDANT) as engine:
        assert torch.equal(engine.generate(tokens, **settings), plain)
        with pytest.raises(ValueError, match="return_dict_in_generate is True; the engine returns token ids alone"):
            engine.generate(tokens, return_dict_in_generate=True)


def test_two_threads_take_turns(switch):
    plain, stream, results = copy.deepcopy(switch.model), batches(), {}
    with Engine(switch, Noise(switch.layout), DEVICES, REDUNDANT) as engine:

        def run(name: str) -> None:
            results[name] = [output.logits for output in engine.run(iter(stream))]

        threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for logits in results.values():
        for batch, ours in zip(stream, logits, strict=True):
            real = batch.decoder.mask
            torch.testing.assert_close(ours[real], forward(plain, batch)[real], rtol=0, atol=1e-5)
    assert set(results) == {"a", "b"}


def test_an_engine_that_is_not_open_says_so(switch):
    engine, batch = Engine(switch, None, DEVICES, 0), batches(1)[0]
    for _ in range(2):  # before and after
        with pytest.raises(RuntimeError, match="the engine is not open; use it inside `with engine:`"):
            next(engine.run([batch]))
        with pytest.raises(RuntimeError, match="the engine is not open"):
            engine.generate(batch.tokens)
        with engine, pytest.raises(RuntimeError, match="the engine is open already"):
            engine.__enter__()


def test_a_model_serves_one_engine_at_a_time(switch):
    first, second = Engine(switch, None, DEVICES, 0), Engine(switch, None, DEVICES, 0)
    before = switch.model.get_submodule("encoder.block.1.layer.1.mlp.experts")
    with first:
        with pytest.raises(ValueError, match="another engine runs this model, or one built from the same"):
            second.__enter__()
        with pytest.raises(ValueError, match="another engine runs this model"):
            Engine(switch, None, DEVICES, 0)
    with second:
        pass
    assert switch.model.get_submodule("encoder.block.1.layer.1.mlp.experts") is before


def test_devices_that_do_not_divide_are_refused(switch):
    with pytest.raises(ValueError, match="8 experts and 0 redundant experts do not divide over 3 devices"):
        Engine(switch, None, 3, 0)
    with pytest.raises(ValueError, match="10 redundant experts do not divide over 4 devices"):
        Engine(switch, None, 4, 10)


class Pupil(Noise):
    """Keeps what it is shown."""

    def __init__(self, layout):
        super().__init__(layout)
        self.seen = []

    def observe(self, upcoming, load, sequences=None):
        self.seen.append((upcoming, load, sequences))


def test_a_forecaster_that_learns_is_shown_the_load_of_every_sequence(switch):
    pupil = Pupil(switch.layout)
    outputs = assert_answers_unchanged(Engine(switch, pupil, DEVICES, REDUNDANT))
    assert len(pupil.seen) >= len(outputs) // 2
    alone = [[batch.part(slice(row, row + 1)) for row in range(len(batch.tokens.mask))] for batch in batches()]
    with Engine(switch, None, 1, 0) as engine:
        loads = [np.stack([output.stats.load for output in engine.run(iter(rows))]) for rows in alone]
    for output, load in zip(outputs, loads, strict=True):
        assert (output.stats.sequence_load == load).all()
        assert (output.stats.sequence_load.sum(0) == output.stats.load).all()
    for number, (tokens, load, sequences) in enumerate(pupil.seen):
        assert torch.equal(tokens.input_ids, batches()[number].tokens.input_ids)
        assert (load == loads[number].sum(0)).all()
        assert (sequences == loads[number]).all()


def test_sequences_are_not_counted_for_a_forecaster_that_does_not_learn(switch):
    with Engine(switch, Noise(switch.layout), DEVICES, REDUNDANT) as engine:
        assert all(output.stats.sequence_load is None for output in engine.run(iter(batches())))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_answers_stay_on_a_gpu_while_a_side_stream_moves_replicas(switch):
    plain = copy.deepcopy(switch.model.to("cuda", torch.bfloat16))
    with Engine(switch, Noise(switch.layout), DEVICES, REDUNDANT) as engine:
        for batch, output in zip(batches(), engine.run(iter(batches())), strict=True):
            real = batch.decoder.mask.to("cuda")
            torch.testing.assert_close(output.logits[real], forward(plain, batch)[real], rtol=2e-2, atol=2e-2)
