"""The result of a training run as one small table for the terminal: the predictor beside its main rivals."""

import numpy as np

from predictor.evaluation.tables import Details

SHOWN = ("adaptive", "learned", "last", "ema", "token_table", "oracle")
"""Forecasters of the table, by the names that options and files use."""
EXPLAINED = "adaptive: this predictor, which goes on learning; learned: as trained; ema: moving average of loads"
ORACLE = "oracle"
BALANCEDNESS = "balancedness_r16"


def result_table(metrics: Details) -> str:
    """Load error on the test batches of each stream, and balancedness with 16 replicas, averaged over streams."""
    streams = list(metrics)
    batches = [metrics[stream][ORACLE]["batches"] for stream in streams]
    balanced = BALANCEDNESS in metrics[streams[0]][ORACLE] and metrics[streams[0]][ORACLE][BALANCEDNESS] is not None
    setting = "; balancedness: 16 replica slots on 8 devices, mean of the streams" * balanced
    rows = [["load error (0 is best)", *streams, *["balancedness (1 is best)"] * balanced]]
    for name in SHOWN:
        row = [name, *(f"{metrics[stream][name]['load_tv']:.3f}" for stream in streams)]
        if balanced:
            row.append(f"{np.mean([metrics[stream][name][BALANCEDNESS] for stream in streams]):.3f}")
        rows.append(row)
    rows.append(["test batches", *map(str, batches), *[""] * balanced])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)] for row in rows]
    title = f"On {sum(batches)} held-out batches{setting}"
    return "\n".join([title, *("  ".join(line) for line in lines), EXPLAINED])
