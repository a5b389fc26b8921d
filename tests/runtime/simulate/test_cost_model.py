from dataclasses import replace

import numpy as np
import pytest

from data.traces.load_stream import as_stream
from predictor.baselines.history import LastBatch
from runtime.balancing.eplb import ContiguousPlanner
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.balancing.planner import BETWEEN_NODES, HomePlanner
from runtime.simulate.cost_model import Hardware, measure
from runtime.simulate.forecasters import TrueLoad
from runtime.simulate.replay import Setting, replay
from runtime.simulate.verdict import verdict

SLOW_DEVICE = Hardware(expert_bytes=1e6, tokens_per_second=1e4, bytes_per_second=1e12, expert_overhead_tokens=0)

LAST = LastBatch()


def judge(share, hardware=SLOW_DEVICE, tokens=2048, steps=60, forecaster=LAST):
    """The verdict on loads drawn from a share `[steps or 1, 1, E]`, 8 devices with 8 redundant experts."""
    loads = np.random.default_rng(0).multinomial(tokens, np.broadcast_to(share, (steps, 1, share.shape[-1])))
    stream, setting = as_stream(loads), Setting(1, steps, ["quota"], hardware)
    homes = contiguous_homes(1, share.shape[-1])

    def run(name, planner, redundant):
        first = ReplicationPlan.at_home(homes, 8, redundant)
        return replay(forecaster, {name: (planner, first)}, stream, setting)[0]

    contiguous = run("contiguous", ContiguousPlanner(), 0)
    return verdict(contiguous, [contiguous, run("home", HomePlanner(8, 8), 8)], hardware)


def hot(experts=32, share=0.5):
    share_E = np.full(experts, (1 - share) / (experts - 1))
    share_E[5] = share
    return share_E[None, None]


def test_uniform_traffic_is_not_worth_it():
    answer = judge(np.full((1, 1, 32), 1 / 32), tokens=65536)
    assert answer["answer"] == "not worth it"
    assert answer["interval"][1] < 0.1


def test_one_hot_expert_is_worth_it():
    answer = judge(hot())
    assert answer["answer"] == "enable"
    # half of the tokens and a quarter of the others on one device of eight, against an eighth on each
    assert answer["net_gain"] == pytest.approx(1 - 0.125 / (0.5 + 3 * 0.5 / 31), abs=0.1)
    assert answer["interval"][0] <= answer["net_gain"] <= answer["interval"][1]


def test_a_few_steps_are_not_enough():
    assert judge(hot(), steps=10)["answer"] == "not enough data"


def test_an_interval_around_the_threshold_is_not_enough():
    quiet, loud = np.full((1, 1, 32), 1 / 32), hot(share=0.2)
    answer = judge(np.concatenate([quiet] * 30 + [loud] * 10), tokens=16384, steps=40)
    assert answer["answer"] == "not enough data"
    assert answer["interval"][0] < 0.1 <= answer["interval"][1]


def test_moves_slower_than_a_batch_eat_the_gain():
    rng = np.random.default_rng(1)
    wandering = np.stack([np.roll(hot()[0], rng.integers(0, 32), axis=-1) for _ in range(60)])
    slow = Hardware(expert_bytes=1e9, tokens_per_second=1e6, bytes_per_second=1e9, expert_overhead_tokens=0)
    assert judge(wandering, slow)["net_gain"] < 0
    assert judge(wandering, slow)["answer"] == "not worth it"


def test_a_move_between_nodes_takes_the_time_of_the_link_between_them():
    arrivals, far = np.array([[3, 1], [0, 2]]), np.array([[0, 1], [0, 1]])
    near = Hardware(expert_bytes=1e6, tokens_per_second=1e4, bytes_per_second=1e9, expert_overhead_tokens=0)
    nodes = replace(near, node_bytes_per_second=2e8)
    assert near.move_seconds(arrivals, far) == pytest.approx([3e-3, 2e-3])
    assert nodes.move_seconds(arrivals, far) == pytest.approx([5e-3, 6e-3])
    assert (near.between_nodes, nodes.between_nodes) == (BETWEEN_NODES, 5)
    assert replace(near, node_bytes_per_second=1e10).between_nodes == 1
    with pytest.raises(ValueError, match=r"node_bytes_per_second is 0\.0, expected a finite number above 0"):
        replace(near, node_bytes_per_second=0.0)


def test_exact_re_planning_pays_moves_on_the_critical_path():
    loads = np.random.default_rng(0).multinomial(2048, np.broadcast_to(hot(), (30, 1, 32)))
    first = ReplicationPlan.at_home(contiguous_homes(1, 32), 8, 8)
    link = Hardware(expert_bytes=1e6, tokens_per_second=1e6, bytes_per_second=1e9, expert_overhead_tokens=0)
    seconds = []
    for name in ("oracle", "exact"):
        planners = {"home": (HomePlanner(8, 8), first)}
        item = replay(TrueLoad(name), planners, as_stream(loads), Setting(1, 30, ["quota"], link))[0]
        seconds.append(link.net_seconds(item)[0] - item.seconds[0])
    assert seconds[1] - seconds[0] > 1e-4


def test_without_a_policy_to_judge_it_says_so():
    assert judge(hot(), forecaster=TrueLoad("oracle"))["why"] == "no policy with replicas and a forecast was replayed"


def test_the_overhead_of_an_active_expert_counts():
    calm = judge(hot(), Hardware(1e6, 1e4, 1e12, expert_overhead_tokens=0))["net_gain"]
    assert judge(hot(), Hardware(1e6, 1e4, 1e12, expert_overhead_tokens=1000))["net_gain"] < calm


def test_the_machine_can_be_measured():
    here = measure(2 * 256 * 256)
    assert here.tokens_per_second > 1000
    assert here.bytes_per_second > 1e7
    assert here.move_tokens > 0


def test_hardware_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="bytes_per_second is -1"):
        Hardware(1, 1, -1, 0)
