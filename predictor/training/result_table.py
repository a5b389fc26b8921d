"""The result of a training run as one small table for the terminal: the predictor beside its main rivals."""

import numpy as np

from predictor.evaluation.tables import Details

SHOWN = {
    "adaptive": "this predictor, learning on", "learned": "this predictor as trained", "last": "last batch",
    "ema": "moving average", "token_table": "token table",
}  # fmt: skip
"""Forecasters of the table and their names; the oracle's row follows."""
ORACLE = "oracle"
BALANCEDNESS = "balancedness_r16"


def result_table(metrics: Details) -> str:
    """Load error on the test batches of each stream, and balancedness with 16 replicas, averaged over streams."""
    streams = list(metrics)
    balanced = BALANCEDNESS in metrics[streams[0]][ORACLE] and metrics[streams[0]][ORACLE][BALANCEDNESS] is not None
    rows = [["load error (0 is best)", *streams, *(["balancedness (1 is best)"] if balanced else [])]]
    for key, name in (SHOWN | {ORACLE: "oracle"}).items():
        row = [name, *(f"{metrics[stream][key]['load_tv']:.3f}" for stream in streams)]
        if balanced:
            row.append(f"{np.mean([metrics[stream][key][BALANCEDNESS] for stream in streams]):.3f}")
        rows.append(row)
    rows.append(["test batches", *(str(metrics[stream][ORACLE]["batches"]) for stream in streams), *[""] * balanced])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)] for row in rows]
    return "\n".join("  ".join(line) for line in lines)
