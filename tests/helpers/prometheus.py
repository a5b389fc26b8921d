"""Reads a Prometheus endpoint."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Every sample that the endpoint gives, by name and label values (labels in alphabetical order)."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        (sample.name.removeprefix("switchcast_"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }
