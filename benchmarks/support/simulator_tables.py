"""Tables from replays of recorded loads: what times of GPUs say of several settings, and how far they are off."""

from typing import Any

from benchmarks.support.results import Results
from benchmarks.support.steps import in_shell
from predictor.evaluation.tables import markdown

MEASURED = ("qwen3_30b", "qwen3_235b", "glm_5", "minimax_m2", "gpt_oss_20b", "deepseek_v3")
"""Models whose experts were timed on an H100 in the precision that they are usually served in."""


def replayed_settings(results: Results, step: str) -> str:
    """A replay with several settings: its command, and the verdict of each.

    Raises:
        ValueError: If the step has no results.
    """
    found = results.document(step)
    names = found["varied"]
    rows = [[*(_shown(row[name]) for name in names), *_verdict(row)] for row in found["rows"]]
    columns = ["verdict", "policy", "% saved (90 %)", "ms a layer", "kept plan, %"]
    table = markdown([*(name.replace("_", " ") for name in names), *columns], rows)
    return f"    {in_shell(results.steps[step])}\n\n{table}"


def kernel_errors_settings(results: Results) -> str:
    """How far times of rows that were left out are off, by model."""
    rows = []
    for model in MEASURED:
        hardware = results.document(f"times-{model}")["verdict"]["hardware"]
        errors = (hardware["error"][name] for name in ("tokens", "ep_size", "skew"))
        kernel = hardware["kernel"].split(",")[0]
        rows.append([f"{model}, {hardware['precision']}", kernel,
                     *(f"{error['median']:.1%} ({100 * error['p90']:.0f})" for error in errors)])  # fmt: skip
    columns = ["shape, precision", "kernel", "between token counts", "between EP sizes", "skewed rows, exponent 1.2"]
    return markdown(columns, rows)


def _shown(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else str(value)


def _verdict(row: dict[str, Any]) -> list[str]:
    low, high = (100 * end for end in row["interval"])
    milliseconds = row["layer_ms"]
    return [
        row["answer"], ".".join(row["policy"].values()), f"{100 * row['net_gain']:.1f} ({low:.0f} to {high:.0f})",
        f"{milliseconds['without']:.3g} -> {milliseconds['with']:.3g}", f"{100 * row['kept_plan']['net_gain']:.1f}",
    ]  # fmt: skip
