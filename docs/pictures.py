"""Draws docs/img/split.png, the picture in docs/concepts.md, from recorded loads.

    python -m docs.pictures

One layer and step of gpt-oss-20b (tests/runtime/recorded/gptoss20b.npz) on 8 devices: without replicas, with EPLB's
replicas and an even split, and with Switchcast's replicas and exact split. Both plans know past steps alone.
"""

from pathlib import Path

import numpy as np

from data.arrays import IntArray
from data.style import GREY, HOT, INK, OURS, SMALL, drawing, heading, panels, save
from runtime.balancing.balancer import Balancer
from runtime.balancing.eplb import rebalance_experts
from runtime.balancing.plan import contiguous_homes
from runtime.balancing.split import split_by_quota, split_evenly

ROOT = Path(__file__).parents[1]
LOADS = ROOT / "tests/runtime/recorded/gptoss20b.npz"
DEVICES, REPLICAS = 8, 16
LAYER, STEP = 2, 50


def splits(loads: IntArray) -> dict[str, IntArray]:
    """Tokens of each expert on each device, `[E, G]`, in `LAYER` and `STEP`, by the name of the way they are split.

    Args:
        loads: Tokens of each expert, `[steps, L, E]`; plans know the steps before `STEP`.
    """
    num_experts = loads.shape[2]
    homes = contiguous_homes(*loads.shape[1:])
    balancer = Balancer(DEVICES, REPLICAS, homes=homes)
    for load in loads[:STEP]:
        balancer.step(load)
    eplb = rebalance_experts(loads[STEP - 1], num_experts + REPLICAS, 1, 1, DEVICES)[0]
    ways = {
        "no replicas": (split_evenly, homes),
        "EPLB, even split": (split_evenly, eplb),
        "Switchcast, exact split": (split_by_quota, balancer.plan.phy2log),
    }
    tokens = {}
    for name, (split, phy2log) in ways.items():
        quota = split(loads[STEP, LAYER], phy2log[LAYER], DEVICES)[0]
        tokens[name] = np.zeros((num_experts, DEVICES), int)
        device = np.arange(len(quota)) * DEVICES // len(quota)
        np.add.at(tokens[name], (phy2log[LAYER], device), quota)
    return tokens


@drawing()
def draw(loads: IntArray, path: Path) -> None:
    """Saves the picture."""
    load = loads[STEP, LAYER]
    order = np.argsort(np.arange(len(load)) == load.argmax(), kind="stable")  # the hottest expert comes last, on top
    figure, axes = panels(8.3, 2.9, columns=3, sharey=True)
    for axis, (name, tokens) in zip(axes[0], splits(loads).items(), strict=True):
        below = np.zeros(DEVICES, int)
        for expert in order:
            colour = HOT if expert == order[-1] else GREY
            axis.bar(range(DEVICES), tokens[expert], 0.8, below, color=colour, edgecolor="white", linewidth=0.7)
            below += tokens[expert]
        axis.axhline(below.max(), color=INK, linewidth=1, linestyle=(0, (4, 2)))
        axis.text(7.45, below.max() + 10, below.max(), ha="right", fontsize=SMALL, color=INK)
        axis.set_title(name, color=OURS if name.startswith("Switchcast") else INK)
        axis.set_xticks(range(DEVICES))
        axis.grid(axis="x", visible=False)
        axis.set_xlabel("device")
    axes[0, 0].set_ylabel("tokens (assignments)")
    note = "one layer and step of gpt-oss-20b, 16 replica slots; each piece is an expert, the hottest is orange"
    heading(figure, f"All devices wait for the slowest (dashed); even would be {load.sum() // DEVICES}", note)
    save(figure, path)


if __name__ == "__main__":
    with np.load(LOADS) as recorded:
        draw(recorded["counts"], ROOT / "docs/img/split.png")
