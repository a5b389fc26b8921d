"""The model card of a pretrained model: README.md and its loss curve."""

from pathlib import Path
from types import ModuleType
from typing import Any

from data.files import whole_file
from data.style import GREY, INK, OURS, drawing, end_labels, heading, panels, save

CARD = """---
license: apache-2.0
library_name: transformers
tags: [{tag}, mixture-of-experts]
---
# {name}

A {kind} for developing and demonstrating Switchcast: {experts} experts in each MoE layer, trained from scratch on real
text. Its routing is real and skewed; the text it generates is poor.

| | |
|---|---|
| task | {task} |
| text | every other document of the offline corpus (`data/text/corpus.py`): {tokens:,} tokens in {segments} |
| training | {steps:,} steps of {sequences} x {length} tokens, AdamW, peak learning rate {peak_lr}, seed {seed} |
| routers | {routing} |
| held-out loss | **{held_out_loss:.3f}** nats per target token, on the corpus' other documents, in bf16 as saved |
| unigram model | {unigram_loss:.3f} nats on the same tokens |
| made with | `{command}`, torch {torch}, Python {python} |

![loss curve](loss.png)

Not for use as a language model: it was trained on a few million tokens. Switchcast's traces are made of the offline
corpus' remaining documents, which this model was not trained on.
"""


def write_card(folder: Path, kind: ModuleType, config: Any, facts: dict[str, Any]) -> None:
    """Writes the model card, README.md and loss.png, beside the weights.

    Args:
        folder: The model's folder.
        kind: The family's module in this package.
        config: The model's configuration.
        facts: Content of training.json: recipe, tokens of each segment, losses, versions, loss curve.
    """
    card = CARD.format(
        name=folder.name, tag=config.model_type, kind=kind.KIND, experts=config.num_experts, task=kind.TASK,
        routing=kind.ROUTING, command=f"python -m data.pretrain --family {facts['family']}",
        tokens=sum(facts["tokens"].values()), segments=", ".join(facts["tokens"]),
        held_out_loss=facts["held_out_loss"], unigram_loss=facts["unigram_loss"],
        **facts["recipe"], **facts["versions"],
    )  # fmt: skip
    with whole_file(folder / "README.md") as aside:
        aside.write_text(card)
    _plot(folder / "loss.png", facts)


@drawing()
def _plot(path: Path, facts: dict[str, Any]) -> None:
    figure, axes = panels(6, 3.4)
    axis = axes[0, 0]
    steps, losses = zip(*facts["loss_curve"], strict=True)
    held_out, unigram = facts["held_out_loss"], facts["unigram_loss"]
    axis.plot(steps, losses, color=OURS, linewidth=2.4)
    axis.axhline(held_out, color=INK, linewidth=1)
    axis.axhline(unigram, color=GREY, linewidth=1)
    axis.set(xlabel="step", ylabel="cross-entropy, nats per target token", xlim=(0, steps[-1]))
    ends = [(losses[-1], f"training {losses[-1]:.2f}", OURS), (held_out, f"held out {held_out:.2f}", INK)]
    end_labels(axis, [*ends, (unigram, f"unigram model {unigram:.2f}", GREY)])
    heading(figure, f"Pretraining of {path.parent.name}", "held-out text in bf16 as saved; training: mean of 100 steps")
    save(figure, path)
