"""What skewed loads cost on each GPU, by tokens an expert: measured time of skewed rows over that of balanced ones.

    python -m benchmarks.skew_cost

Skewed rows follow a power law of exponent 1.2; the most loaded GPU is timed. Medians over the models of the excerpt, in
their usual precision, by GPU and EP size; then by model. The last column is the number of tokens an expert from which
skew costs a tenth or more. Prints Markdown tables and, in a pipe, one line of JSON.
"""

from collections import defaultdict
from itertools import pairwise

import numpy as np

from data.cli import print_json
from predictor.evaluation.tables import markdown
from runtime.gpu.devices import GPUS
from runtime.gpu.shapes import MODELS
from runtime.gpu.sites import Site, all_sites, even_site
from runtime.gpu.skew import POWER

BOUNDS = (0, 4, 16, 32, 64, 128, 256, 512, np.inf)
NAMES = ("< 4", "4-16", "16-32", "32-64", "64-128", "128-256", "256-512", "> 512")
COST = 1.1
"""Ratio from which skew is said to cost something."""
SIZES = (4, 8, 16, 32)
Ratios = list[tuple[float, float]]
"""Tokens an expert, and the time of a skewed row over that of the balanced one."""


def ratios(site: Site, ep_size: int) -> Ratios:
    """Of one site and EP size, by rising tokens."""
    rows = {
        (row["distribution"], row["tokens"]): row["milliseconds"]
        for row in site.rows.to_pylist()
        if row["ep_size"] == ep_size
    }
    scale = site.shape.top_k / site.shape.num_experts
    skewed = sorted(tokens for name, tokens in rows if name == f"power_law_{POWER}" and ("balanced", tokens) in rows)
    return [(n * scale, rows[f"power_law_{POWER}", n] / rows["balanced", n]) for n in skewed]


def by_load(found: Ratios) -> list[float | None]:
    """Medians by the bounds of tokens an expert; None where nothing was measured."""
    load, ratio = np.array(found).reshape(-1, 2).T
    parts = [ratio[(load >= low) & (load < high)] for low, high in pairwise(BOUNDS)]
    return [round(float(np.median(part)), 2) if len(part) else None for part in parts]


def begins(medians: list[float | None]) -> str:
    """The first range from which on skew costs something."""
    costs = [value is not None and value >= COST for value in medians]
    free = [place for place, value in enumerate(medians) if value is not None and value < COST]
    first = free[-1] + 1 if free else 0
    return NAMES[first].split("-")[0].strip("<> ") if any(costs[first:]) else "never"


def usual_sites(gpu: str) -> dict[str, Site]:
    """The site of each known model on a GPU, in the first precision that was measured of its usual one and bfloat16."""
    device, found = GPUS[gpu], {}
    measured = {
        (site.shape.hidden_size, site.shape.intermediate_size, site.shape.precision) for site in all_sites(device)
    }
    for name, shape in MODELS.items():
        for precision in (shape.precision, "bfloat16"):
            if name not in found and (shape.hidden_size, shape.intermediate_size, precision) in measured:
                found[name] = even_site(device, type(shape)(**(vars(shape) | {"precision": precision})))
    return found


def main() -> None:
    """Prints the tables."""
    report: dict[str, dict[str, list[float | None]]] = defaultdict(dict)
    for gpu in GPUS:
        for size in SIZES:
            sites = usual_sites(gpu).values()
            report["by GPU"][f"{gpu}, EP {size}"] = by_load([pair for site in sites for pair in ratios(site, size)])
    for name, site in usual_sites("h100_sxm").items():
        report["by model, H100, EP 8"][f"{name}, {site.shape.precision}"] = by_load(ratios(site, 8))
    for title, rows in report.items():
        cells = [
            [name, *("" if value is None else f"{value:.2f}" for value in medians), begins(medians)]
            for name, medians in rows.items()
        ]
        print(f"\n{title}\n\n{markdown(['tokens an expert', *NAMES, 'costs from'], cells)}")
    print_json(report)


if __name__ == "__main__":
    main()
