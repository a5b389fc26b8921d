"""Prints the ladder of trained predictors as Markdown, from what their folders say about their test.

    python -m predictor.show outputs/predictor
    python -m predictor.show ours=outputs/predictor paper=outputs/paper/predictor sida=outputs/sida/predictor

The rivals' rows are the first folder's; the folders must have been tested on the same batches.
"""

import sys
from pathlib import Path
from typing import Any

from data.cli import user_errors
from data.models.layout import MoELayout
from predictor.checkpoint import read_config
from predictor.evaluation.tables import CAPTIONS, Details, comparison_table, figure, layers_table, markdown
from predictor.network import Architecture, LoadNetwork

LEARNED, WITNESS = "learned", "last"


def read_folders(wanted: list[str]) -> dict[str, dict[str, Any]]:
    """Name and config.json of each folder, given as FOLDER or NAME=FOLDER.

    Raises:
        ValueError: If there is none, a name comes twice, or a folder tells nothing about its test.
    """
    configs: dict[str, dict[str, Any]] = {}
    for word in wanted:
        name, _, folder = word.rpartition("=")
        if (name := name or LEARNED) in configs:
            raise ValueError(f"two folders are called '{name}'; name them apart: NAME=FOLDER")
        configs[name] = read_config(Path(folder))
        if not configs[name].get("metrics") or "segments" not in configs[name]:
            raise ValueError(f"{folder} says nothing about a test; train it with `python train.py`")
    if not configs:
        raise ValueError("no folder given; expected FOLDER or NAME=FOLDER, such as outputs/predictor")
    return configs


def merged(configs: dict[str, dict[str, Any]]) -> Details:
    """One ladder: the first folder's rivals and every folder's own row.

    Raises:
        ValueError: If folders were not tested on the same batches.
    """
    first, details = next(iter(configs)), {}
    for stream, rows in configs[first]["metrics"].items():
        details[stream] = {name: row for name, row in rows.items() if name != LEARNED}
        for name, config in configs.items():
            other = config["metrics"].get(stream, {})
            if other.get(WITNESS, {}).get("load_tv_layers") != rows[WITNESS]["load_tv_layers"]:
                raise ValueError(f"'{name}' and '{first}' were tested on other batches of {stream}; use one trace")
            details[stream][name] = other[LEARNED]
    return details


def costs(configs: dict[str, dict[str, Any]], details: Details) -> str:
    """What each network is and costs."""
    rows = []
    for name, config in configs.items():
        shape = Architecture(**config["architecture"])
        network = LoadNetwork(MoELayout.from_json(config["layout"]), shape)
        made = config["provenance"]
        direction = "both directions" if shape.bidirectional else "left to right"
        rows.append([
            name, f"{shape.cell.upper()} {shape.width} x {shape.depth}, {direction}",
            f"{sum(value.numel() for value in network.parameters()):,}",
            f"{made['training_seconds']:.0f}", f"{made['training_cpu_seconds']:.0f}",
            f"{max(rows[name]['milliseconds'] for rows in details.values()):.0f}",
        ])  # fmt: skip
    return markdown(["network", "shape", "parameters", "training s", "CPU s", "forecast ms"], rows)


def _segments(config: dict[str, Any]) -> str:
    """Load error of the encoder's layers and token top-1 on each segment alone, the token table's beside."""
    rows = []
    for name, found in config["segments"].items():
        cells = [figure(found[who], metric) for metric in ("load_tv", "token_top1") for who in ("token_table", LEARNED)]
        rows.append([name, "yes" if found["seen"] else "no", str(found[LEARNED]["batches"]), *cells])
    header = ["segment", "in training", "batches", "load_tv, table", "load_tv", "top-1, table", "top-1"]
    return markdown(header, rows)


def show(wanted: list[str]) -> str:
    """The tables of some folders."""
    configs = read_folders(wanted)
    details = merged(configs)
    layer_names = MoELayout.from_json(next(iter(configs.values()))["layout"]).layer_names
    parts = [f"{caption}\n\n{comparison_table(details, metric)}" for metric, caption in CAPTIONS.items()]
    rivals = [name for name in ("last", "ema", "token_table") if name in next(iter(details.values()))]
    parts.append(f"Total variation, layer by layer\n\n{layers_table(details, layer_names, [*rivals, *configs])}")
    parts += [f"Segments, {name}\n\n{_segments(config)}" for name, config in configs.items()]
    parts.append(f"Networks\n\n{costs(configs, details)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    with user_errors():
        print(show(sys.argv[1:]))
