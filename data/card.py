"""The model card of a small Switch model trained here: how it was made and how good it is, with its loss curve."""

from pathlib import Path
from typing import Any

from data.files import whole_file

CARD = """---
license: apache-2.0
library_name: transformers
tags: [switch_transformers, mixture-of-experts]
---
# {name}

A small Switch Transformer for developing and demonstrating Switchcast: {experts} experts in each of {layers} MoE
layers, trained from scratch on real text. Its routing is real and skewed; its language is not worth reading.

| | |
|---|---|
| task | span corruption (15 % of the tokens, mean span 3) |
| text | every other document of the offline corpus (`data/text.py`): {tokens:,} tokens in {segments} |
| training | {steps:,} steps of {sequences} x {length} tokens, AdamW, peak learning rate {peak_lr}, seed {seed} |
| router losses | auxiliary 0.001, z 0.001, jitter 0.01; capacity {capacity} tokens a sequence |
| held-out loss | **{held_out_loss:.3f}** nats a target token, on the corpus' other documents, in bf16 as saved |
| unigram model | {unigram_loss:.3f} nats on the same tokens |
| made with | `python -m data.pretrain`, torch {torch}, Python {python} |

![loss curve](loss.png)

Not for use as a language model: it saw six million tokens. The offline corpus' remaining documents are the traffic
that Switchcast's traces are made of; this model never saw them.
"""


def write_card(folder: Path, config: Any, facts: dict[str, Any]) -> None:
    """Writes README.md and loss.png beside the weights.

    Args:
        folder: The model's folder.
        config: The model's configuration.
        facts: training.json: recipe, tokens of each segment, losses, versions, loss curve.
    """
    card = CARD.format(
        name=folder.name, experts=config.num_experts, capacity=config.expert_capacity,
        layers=config.num_sparse_encoder_layers + config.num_sparse_decoder_layers,
        tokens=sum(facts["tokens"].values()), segments=", ".join(facts["tokens"]),
        held_out_loss=facts["held_out_loss"], unigram_loss=facts["unigram_loss"],
        **facts["recipe"], **facts["versions"],
    )  # fmt: skip
    with whole_file(folder / "README.md") as aside:
        aside.write_text(card)
    _plot(folder / "loss.png", facts)


def _plot(path: Path, facts: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*facts["loss_curve"], strict=True), marker=".", label="training")
    axes.axhline(facts["held_out_loss"], color="C1", label="held out, at the end")
    axes.axhline(facts["unigram_loss"], color="C2", linestyle="--", label="unigram model, held out")
    axes.set(xlabel="step", ylabel="nats a target token", title=path.parent.name)
    axes.legend()
    with whole_file(path) as aside:
        figure.savefig(aside, dpi=100, format="png")
