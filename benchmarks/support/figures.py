"""Forms of figures and tables that several folders of results share."""

from typing import Any

from predictor.evaluation.tables import markdown


def share(value: float) -> str:
    """A share with three digits, as in .964."""
    return f"{value:.3f}".removeprefix("0")


def percent(value: float) -> str:
    """A share in hundredths, without digits behind the point."""
    return f"{100 * value:.0f}"


def span(values: list[float]) -> str:
    """Smallest to largest, or one figure where they look alike."""
    return "-".join(dict.fromkeys(share(value) for value in (min(values), max(values))))


def between(ends: list[float]) -> str:
    """Lowest and highest, as in 434-567."""
    return "-".join(f"{end:.0f}" for end in ends)


def listed(words: list[str]) -> str:
    """Words with commas, and "and" before the last."""
    return f"{', '.join(words[:-1])} and {words[-1]}"


def parts(rows: list[dict[str, Any]], model: str) -> str:
    """An ablation: balancedness with one part after the other switched on, and the experts that move."""
    cells = [
        [row["part"], f"{share(row['balancedness'])} [{', '.join(map(share, row['interval']))}]",
         f"{row['moves_per_layer']:.1f}"]
        for row in rows
    ]  # fmt: skip
    return markdown(["switched on", model, "moves a layer and batch"], cells)


def speeds(rows: list[dict[str, Any]], rivals: dict[str, str]) -> str:
    """Time of one device's layer, and its speed over rivals' with quartiles."""
    cells = []
    for row in rows:
        line = [f"{row['tokens']:,}", "a quarter" if row["padded"] else "none", f"{row['slots_ms']:.2f}"]
        for rival in rivals:
            low, high = (1 / end for end in reversed(row[f"over_{rival}_quartiles"]))
            line.append(f"{1 / row[f'over_{rival}']:.2f} ({low:.2f}-{high:.2f})")
        cells.append(line)
    return markdown(["tokens", "padding", "ms", *(f"speed over {name}" for name in rivals.values())], cells)


def within_a_quarter(found: dict[str, Any], called: dict[str, str]) -> str:
    """Arms of a benchmark within a memory budget."""
    of_lru = found["lru"]["tokens_per_s"]
    rows = [
        [name, f"{arm['tokens_per_s']:.0f}", between(arm["spread"]), f"{arm['tokens_per_s'] / of_lru:.2f}",
         f"{arm['hit_rate']:.0%}", f"{arm['bytes_per_token'] / 1e6:.2f}", f"{arm['stall_ms']:.0f}"]
        for key, name in called.items() for arm in [found[key]]
    ]  # fmt: skip
    header = ["arm", "tokens/s", "spread", "x LRU", "there when asked for", "MB read a token", "stall, ms a batch"]
    return markdown(header, rows)
