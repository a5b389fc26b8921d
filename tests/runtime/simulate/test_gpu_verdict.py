"""Verdicts for GPUs: from a recording to net milliseconds, with their error; what they refuse, where they say no."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.traces.load_stream import as_stream
from data.traces.loads import read_loads
from runtime.simulate import compare_policies, gpu_times
from runtime.simulate.__main__ import main
from runtime.simulate.cost_model import Hardware
from runtime.simulate.outcome import Record, SplitStep
from runtime.simulate.step_size import StepSize, at_step_size
from runtime.simulate.verdict import verdict

RECORDED = Path(__file__).parents[1] / "recorded"
GPTOSS = RECORDED / "gptoss20b.npz"
CHOICE = {"forecasts": ["last", "ema"], "planners": ["home"], "splits": ["quota"]}


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["simulate", *map(str, words)])
    main()
    return capsys.readouterr().out


def refuse(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["simulate", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def on_h100(tokens, redundant=16, loads=GPTOSS, like="gpt_oss_20b", **settings):
    times = gpu_times("h100_sxm", loads, like)
    return compare_policies(loads, 8, redundant, hardware=times, tokens_per_step=tokens, **(CHOICE | settings))[
        "verdict"
    ]


def test_one_command_prints_net_milliseconds_and_their_error(tmp_path, monkeypatch, capsys):
    shown = command(
        monkeypatch, capsys, GPTOSS, "--gpu", "h100_sxm", "--like", "gpt_oss_20b", "--tokens-per-step", 16000,
        "--forecast", "last,ema", "--planner", "home", "--split", "quota", "--out", tmp_path, "--steps", 40,
    )  # fmt: skip
    text = " ".join(shown.replace("│", " ").split())
    for said in (
        "ms a layer",
        "ms a step of 4 layers",
        "scaled from 512 to 16,000 tokens a step",
        "h100_sxm, 32 experts of gpt_oss_20b",
        "error, median (90th percentile): 1.8% between token counts (10%)",
        "GB a device in all 24 layers of the model, of which 4 were recorded, 50%",
        "ms a step to forecast and plan",
        "kept, few moves",
        f"switchcast export {GPTOSS} --devices 8 --redundant 16 --to sglang --model FOLDER",
    ):
        assert said in text  # fmt: skip
    found = json.loads(shown.splitlines()[-1])["verdict"]
    assert found["layer_ms"]["with"] < found["layer_ms"]["without"]
    assert found["baselines"]["no replicas"]["step_ms"] == found["step_ms"]["without"]
    assert found["baselines"]["no predictor"]["planner"] == "home"
    assert found["memory"] == {
        "bytes_per_device": 634521600, "share_of_experts": 0.5, "share_of_device": 0.0074, "with_experts": 1903564800,
        "layers": 24, "recorded_layers": 4,
    }  # fmt: skip
    assert found["hardware"]["gpu"] == "h100_sxm"
    assert found["hardware"]["error"]["skew"]["median"] == pytest.approx(0.053, abs=0.003)


def test_the_time_without_replicas_is_the_measured_one_of_the_most_loaded_gpu():
    """Even loads are rows of the table; dispatch and combine are those of NCCL."""
    loads = np.full((20, 2, 32), 4096 * 4 // 32)
    times = gpu_times("h100_sxm", loads, "gpt_oss_20b")
    found = compare_policies(loads, 8, 16, hardware=times, **CHOICE)["verdict"]
    exchange = times._links(8).exchange_milliseconds(np.array([4096.0]), 2880)[0]
    assert found["layer_ms"]["without"] == pytest.approx(0.7428 + exchange, rel=0.002)
    assert found["answer"] == "not worth it"


def test_few_tokens_an_expert_are_not_worth_it_and_many_gain_more():
    few, many = on_h100(64), on_h100(12288)
    assert few["traffic"]["tokens_per_expert"] == pytest.approx(8, abs=0.1)
    assert few["answer"] == "not worth it"
    assert few["net_gain"] < 0.05
    assert many["net_gain"] > few["net_gain"] + 0.1


def replayed(forecast, load, moves=0, planner="home", extra=8):
    """A policy with the same device load in each of 40 steps, 40 experts and some replicas."""
    record = Record(planner, "quota", (1, 40, 40 + extra * (planner == "home"), len(load)), HARDWARE)
    for _ in range(40):
        step = SplitStep(np.array([load]), np.ones((1, len(load)), int), 0.0, 0)
        record.add(None, np.full(len(load), moves), np.zeros(len(load), int), 0.0, step)
    return record.outcome(forecast)


HARDWARE = Hardware(1e6, tokens_per_second=1e4, bytes_per_second=1e12, expert_overhead_tokens=0)
BARE = replayed("none", [400, 100], planner="contiguous")


def test_replicas_of_three_times_the_experts_are_not_recommended():
    found = {extra: verdict(BARE, [BARE, replayed("last", [260, 240], extra=extra)], HARDWARE) for extra in (8, 120)}
    assert found[8]["answer"] == "enable"
    assert found[120]["memory"] == {
        "bytes_per_device": 60_000_000, "share_of_experts": 3, "share_of_device": None, "with_experts": 80_000_000,
        "layers": 1, "recorded_layers": 1,
    }  # fmt: skip
    assert found[120]["net_gain"] == found[8]["net_gain"]
    assert found[120]["answer"] == "not worth it"
    assert "but the replicas are 300% of the experts" in found[120]["why"]


def test_a_predictor_that_past_batches_beat_is_not_recommended():
    past, alike = replayed("last", [260, 240], 2), replayed("learned", [260, 240], 1)
    found = verdict(BARE, [BARE, past, alike], HARDWARE)
    assert found["policy"]["forecast"] == "last"
    assert "the forecast learned is not faster than last, which needs no predictor" in found["why"]
    assert found["baselines"]["no predictor"]["forecast"] == "last"
    assert verdict(BARE, [BARE, past, replayed("adaptive", [250, 250])], HARDWARE)["policy"]["forecast"] == "adaptive"


def test_times_of_this_machine_that_vary_widen_the_interval_and_are_named():
    """Every step takes 26 ms of 40; with 5 ms to split in a third of the steps, 31 ms at worst."""
    item = replayed("last", [260, 240])
    slow = replace(item, split_us=np.where(np.arange(40) % 3, 0.0, 5000.0), plan_ms=np.full(40, 3.0))
    found = verdict(BARE, [BARE, slow], HARDWARE)
    assert found["host_ms"] == {"prepare": 3.0, "split": 0.0, "exposed": 0.0, "net_gain_without": 0.35}
    assert (found["net_gain"], found["interval"]) == (0.35, [0.225, 0.35])


def test_sizes_of_a_model_with_other_experts_are_called_sizes_alone(tmp_path, monkeypatch, capsys):
    shown = command(
        monkeypatch, capsys, GPTOSS, "--gpu", "h100_sxm", "--like", "deepseek_v3", "--forecast", "last", "--out",
        tmp_path, "--steps", 20,
    )  # fmt: skip
    text = " ".join(shown.replace("│", " ").split())
    assert "32 experts of deepseek_v3 in fp8_block (sizes alone: that model has 256 experts a layer)" in text
    assert "in the 4 layers that were recorded" in text


def test_an_error_of_the_times_widens_the_interval():
    """A quarter is saved by times that are a third off: the other three quarters may be a quarter more, or less."""
    unsure = Unsure(1e6, tokens_per_second=1e4, bytes_per_second=1e12, expert_overhead_tokens=0)
    assert verdict(BARE, [BARE, replayed("last", [200, 300])], unsure)["interval"] == pytest.approx([0, 0.5], abs=1e-3)
    found = verdict(BARE, [BARE, replayed("last", [340, 160])], unsure)
    assert found["answer"] == "not enough data"
    assert "the times are uncertain by 28.3%: measure on your GPUs" in found["why"]


def test_what_does_not_fit_is_not_recommended():
    small = Small(1e6, tokens_per_second=1e4, bytes_per_second=1e12, expert_overhead_tokens=0)
    found = verdict(BARE, [BARE, replayed("last", [260, 240])], small)
    assert found["answer"] == "not worth it"
    assert "experts and replicas take 24 GB of a device, which has 20: simulate more devices" in found["why"]


class Small(Hardware):
    layers, memory_bytes = 1000, 20e9


class Unsure(Hardware):
    error = 1 / 3


def test_loads_outside_of_the_table_are_refused(tmp_path, monkeypatch, capsys):
    words = ("--gpu", "h100_sxm", "--like", "gpt_oss_20b", "--forecast", "last", "--planner", "home", "--out", tmp_path)
    said = refuse(monkeypatch, capsys, GPTOSS, *words, "--tokens-per-step", 40000)
    assert "outside of the measured table: a step has up to 40,001 tokens, sglang 0.5.14 on h100_sxm" in said
    assert "measured up to 16,384; give --tokens-per-step of at most 16384" in said
    times = gpu_times("h100_sxm", GPTOSS, "gpt_oss_20b")
    with pytest.raises(ValueError, match=r"outside of the measured table: 64 devices, .* measured on up to 32"):
        times.check(as_stream(np.full((4, 1, 64), 8)), 64, 1)
    with pytest.raises(ValueError, match=r"80 experts on a device, .* measured with up to 32; give more --devices"):
        times.check(as_stream(np.full((4, 1, 64), 8)), 1, 80)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--gpu", "h900"], "gpu: unknown 'h900'; choose from a100_sxm, h100_sxm, h200_sxm, b200_sxm, l40s"),
        (["--gpu", "h100_sxm"], "the recording does not name its model: give --like, one of deepseek_v3, kimi_k2"),
        (["--gpu", "h100_sxm", "--top-k", "4"], "or --hidden-size, --intermediate-size"),
        (["--gpu", "h100_sxm", "--like", "gpt5"], "like: unknown 'gpt5'; choose from deepseek_v3, kimi_k2"),
        (
            ["--gpu", "a100_sxm", "--like", "deepseek_v3"],
            "was not measured in fp8_block on a100_sxm; choose from bfloat16",
        ),
        (
            ["--gpu", "h100_sxm", "--like", "gpt_oss_20b", "--precision", "x"],
            "precision: unknown 'x'; choose from bfloat16",
        ),
        (["--gpu", "h100_sxm", "--tokens-per-second", "5"], "--gpu takes speeds from measured tables; leave out"),
        (
            ["--like", "gpt_oss_20b"],
            "--like, --precision and sizes of experts are for --gpu; add that, or leave them out",
        ),
        (["--gpu", "h100_sxm", "--like", "gpt_oss_20b", "--tokens-per-step", "0"], "tokens_per_step is 0.0, expected"),
        (["--tokens-per-step", "1e30"], "tokens_per_step is 1e+30, expected at most 9007199254740992 assignments"),
        (
            ["--gpu", "h100_sxm", "--like", "gpt_oss_20b", "--tokens-per-step", "64", "--forecast", "own"],
            "forecast own reads tokens, but tokens_per_step keeps counts alone",
        ),
    ],
)
def test_mistakes_end_in_one_line(words, text, tmp_path, monkeypatch, capsys):
    assert text in refuse(monkeypatch, capsys, GPTOSS, *words, "--out", tmp_path)


def test_a_layout_or_given_sizes_need_no_name():
    given = gpu_times("h100_sxm", GPTOSS, precision="w4a16_mxfp4", hidden_size=2880, intermediate_size=2880, top_k=4)
    named = gpu_times("h100_sxm", GPTOSS, "gpt_oss_20b")
    assert given.site.rows.equals(named.site.rows)
    assert given.described(8)["model"] == "custom"


def test_a_layer_that_nobody_measured_is_called_an_estimate():
    found = on_h100(2048, loads=RECORDED / "dsv2lite.npz", like="deepseek_v2_lite")
    assert found["hardware"]["estimate"] == "from the utilisation of 2048 x 768, top 8"
    assert found["hardware"]["error"]["shape"]["median"] > 0.1


def test_more_tokens_keep_the_shares_and_fewer_are_drawn_from_them():
    recorded = read_loads(GPTOSS)
    stream = as_stream(recorded)
    more, fewer = (at_step_size(stream, tokens, 4) for tokens in (2048, 64))
    loads = {name: np.stack([step.load for step in each.steps()]) for name, each in (("more", more), ("fewer", fewer))}
    assert (loads["more"] == 4 * recorded.loads).all()
    assert StepSize.of(fewer, 4).tokens_per_step == 64
    assert (loads["fewer"] <= recorded.loads).all()
    assert all((step.load == load).all() for step, load in zip(fewer.steps(), loads["fewer"], strict=True))
    assert StepSize.of(stream, 4) == StepSize(512, 64, 512)
    silent = np.concatenate([recorded.loads, np.zeros_like(recorded.loads[:, :1])], 1)
    assert StepSize.of(as_stream(silent), 4).tokens_per_step == 512
