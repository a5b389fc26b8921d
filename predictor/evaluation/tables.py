"""Markdown tables of the comparison of forecasters, for the terminal, the model card and the docs."""

from typing import Any

Details = dict[str, dict[str, dict[str, Any]]]
"""Stream -> forecaster -> metric: `metrics` in config.json of a predictor folder."""
REDUNDANT = (16, 8)
"""Numbers of redundant experts, over 8 devices, with which forecasters are compared by balancedness."""
CAPTIONS = {
    "load_tv": "Total variation between forecast and true load (lower is better)",
    "hot_recall": "Share of the 16 hottest experts found",
    "token_top1": "Share of tokens whose expert was predicted (with top-k routing: of their experts)",
    "balancedness_r16": "Balancedness, 8 devices, 16 redundant experts (1 is perfect)",
    "regret_r16": "Regret: balancedness of the oracle's forecast less this one's, 16 redundant experts",
    "gap_closed_r16": "Share of the gap between last batch and oracle that is closed, 16 redundant experts",
    "balancedness_r8": "Balancedness, 8 devices, 8 redundant experts (1 is perfect)",
    "regret_r8": "Regret: balancedness of the oracle's forecast less this one's, 8 redundant experts",
    "gap_closed_r8": "Share of the gap between last batch and oracle that is closed, 8 redundant experts",
    "coverage_80": "Share of experts whose true share lies in the 80 % interval of the forecast",
}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(values: dict[str, Any], metric: str) -> str:
    """A metric with its 95 % interval as text; empty if the forecaster does not have it."""
    if (value := values.get(metric)) is None:
        return ""
    interval = values.get(f"{metric}_interval")
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def comparison_table(details: Details, metric: str) -> str:
    """One metric: a row for each forecaster that has it, a column for each stream."""
    streams = list(details)
    rows = [[name, *(figure(details[stream][name], metric) for stream in streams)] for name in details[streams[0]]]
    return markdown(["forecaster", *streams], [row for row in rows if any(row[1:])])


def layers_table(details: Details, layer_names: list[str], names: list[str]) -> str:
    """Total variation per layer of some forecasters, a row for each stream and forecaster."""
    rows = [
        [stream, name, *("" if tv is None else f"{tv:.3f}" for tv in forecasters[name]["load_tv_layers"])]
        for stream, forecasters in details.items()
        for name in names
    ]
    return markdown(["stream", "forecaster", *layer_names], rows)
