"""Prints the test results of trained predictors as Markdown tables, read from the config.json of their folders.

    python -m predictor.show outputs/predictor
    python -m predictor.show ours=outputs/predictor paper=outputs/paper/predictor sida=outputs/sida/predictor

The rows of the baselines come from the first folder; all folders must have been tested on the same batches.
"""

from pathlib import Path
from typing import Any

from data.cli import OneLineParser, print_json, user_errors
from data.models.layout import MoELayout
from predictor.checkpoint import read_config
from predictor.evaluation.tables import CAPTIONS, Details, comparison_table, figure, layers_table, markdown
from predictor.network import Architecture, LoadNetwork

LEARNED, ADAPTIVE = "learned", "adaptive"
CHECKED = "last"
"""The baseline whose figures tell whether two folders were tested on the same batches: it depends on nothing else."""


def read_folders(wanted: list[str]) -> dict[str, dict[str, Any]]:
    """Name and config.json of each folder, given as FOLDER or NAME=FOLDER.

    Raises:
        ValueError: If a name is given twice, or a folder has no test results.
    """
    configs: dict[str, dict[str, Any]] = {}
    for word in wanted:
        name, _, folder = word.rpartition("=")
        if (name := name or LEARNED) in configs:
            raise ValueError(f"two folders have the name '{name}'; give each its own: NAME=FOLDER")
        configs[name] = read_config(Path(folder))
        if not configs[name].get("metrics") or "segments" not in configs[name]:
            raise ValueError(f"{folder} has no test results; expected a predictor written by `python train.py`")
    return configs


def merged(configs: dict[str, dict[str, Any]]) -> Details:
    """One comparison: the baselines of the first folder and the predictor of every folder.

    Raises:
        ValueError: If the folders were not tested on the same batches.
    """
    first, details = next(iter(configs)), {}
    for stream, rows in configs[first]["metrics"].items():
        details[stream] = {name: row for name, row in rows.items() if name not in (LEARNED, ADAPTIVE)}
        for name, config in configs.items():
            other = config["metrics"].get(stream, {})
            if other.get(CHECKED, {}).get("load_tv_layers") != rows[CHECKED]["load_tv_layers"]:
                raise ValueError(
                    f"'{name}' and '{first}' were tested on different batches of {stream}; train both on one trace"
                )
            details[stream][name] = other[LEARNED]
            if ADAPTIVE in other:  # folders of earlier versions were tested without it
                details[stream][ADAPTIVE if name == LEARNED else f"{name}, {ADAPTIVE}"] = other[ADAPTIVE]
    return details


def costs(configs: dict[str, dict[str, Any]], details: Details) -> str:
    """Table of each network's shape, size, training time and forecast time."""
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
    """Table of total variation (encoder layers) and token top-1 per segment, for the token table and the predictor."""
    rows = []
    for name, found in config["segments"].items():
        cells = [
            figure(found[forecaster], metric)
            for metric in ("load_tv", "token_top1")
            for forecaster in ("token_table", LEARNED)
        ]
        rows.append([name, "yes" if found["seen"] else "no", str(found[LEARNED]["batches"]), *cells])
    figures = [f"{metric}, {name}" for metric in ("load_tv", "top-1") for name in ("token_table", LEARNED)]
    header = ["segment", "in training", "batches", *figures]
    return markdown(header, rows)


def show(configs: dict[str, dict[str, Any]], details: Details) -> str:
    """All tables of some folders, as Markdown."""
    layer_names = MoELayout.from_json(next(iter(configs.values()))["layout"]).layer_names
    parts = [f"{caption}\n\n{comparison_table(details, metric)}" for metric, caption in CAPTIONS.items()]
    baselines = [name for name in ("last", "ema", "token_table") if name in next(iter(details.values()))]
    parts.append(f"Total variation per layer\n\n{layers_table(details, layer_names, [*baselines, *configs])}")
    parts += [f"Segments, {name}\n\n{_segments(config)}" for name, config in configs.items()]
    parts.append(f"Networks\n\n{costs(configs, details)}")
    return "\n\n".join(parts)


def main() -> None:
    """Command line: the tables and, in a pipe, one JSON document."""
    with user_errors():
        parser = OneLineParser(prog="python -m predictor.show", description=(__doc__ or "").splitlines()[0])
        parser.add_argument(
            "folders", nargs="+", type=str, metavar="[NAME=]FOLDER",
            help="predictor folder, with a name for its rows (needed for more than one folder)",
        )  # fmt: skip
        configs = read_folders(parser.parse_args().folders)
        details = merged(configs)
    print(show(configs, details))
    print_json({"metrics": details})


if __name__ == "__main__":
    main()
