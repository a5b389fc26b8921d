"""Cost of a forecast relative to the model: milliseconds for one batch of 16 sequences of 128 tokens.

    python -m benchmarks.forecast_cost

Two pairs of model and predictor, timed in turn on the same threads: an encoder with the geometry of switch-base-8 and
the predictor of configs/switch_base_8.yaml (both with random weights, which cost the same as trained ones), and the
bundled model's encoder and the predictor of configs/default.yaml. The forecast is compared with the encoder alone,
because a complete forward pass costs more. Prints a table and, in a pipe, one line of JSON.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

from data.cli import print_json
from data.models.layout import MoELayout
from data.models.model import load_model
from data.models.weights import BUNDLED
from data.traces.trace import TokenBatch
from predictor.forecaster import NeuralForecaster
from predictor.network import Architecture, LoadNetwork

SEQUENCES, LENGTH, PAST = 16, 128, 64
PAIRS, WARM = 10, 2
CONFIGS = Path(__file__).parents[1] / "configs"
BASE_8 = SwitchTransformersConfig(
    vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_experts=8, expert_capacity=64,
    num_layers=12, num_sparse_encoder_layers=6, num_decoder_layers=12, num_sparse_decoder_layers=6,
)  # fmt: skip


def base_8() -> tuple[Any, MoELayout]:
    """An encoder with the geometry of switch-base-8, and the layout of the whole model."""
    blocks = range(1, 12, 2)
    layers = tuple((stack, block) for stack in ("encoder", "decoder") for block in blocks)
    layout = MoELayout("switch-base-8", "", layers, 8, 64, BASE_8.d_model, BASE_8.d_ff, BASE_8.vocab_size)
    return SwitchTransformersEncoderModel(BASE_8).eval(), layout


def forecaster(layout: MoELayout, config: str) -> NeuralForecaster:
    """A predictor with random weights and the architecture of a configuration file."""
    settings = yaml.safe_load((CONFIGS / config).read_text())["model"]["architecture"]
    table = torch.randn(layout.vocab_size, layout.d_model)
    network = LoadNetwork(layout, Architecture(**settings))
    return NeuralForecaster(layout, network, table, torch.ones(2, layout.num_layers, 3))


def milliseconds(calls: list[Callable[[], Any]]) -> list[list[float]]:
    """Durations of each call, `[calls][PAIRS]`; the calls alternate, so that a busy machine slows all equally."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(WARM + PAIRS):
        for call, kept in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            kept.append(1e3 * (time.perf_counter() - began))
    return [kept[WARM:] for kept in times]


def compare(name: str, encoder: Any, layout: MoELayout, config: str) -> dict[str, Any]:
    """One pair: medians and quartiles of both, and of the forecast in percent of the encoder."""
    predictor = forecaster(layout, config)
    ids = torch.randint(layout.vocab_size, (SEQUENCES, LENGTH))
    tokens = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))
    past = np.random.default_rng(0).integers(0, 99, (PAST, layout.num_layers, layout.num_experts))

    @torch.inference_mode()
    def forward() -> None:
        encoder(input_ids=ids, attention_mask=tokens.mask.long())

    forecast_ms, encoder_ms = milliseconds([lambda: predictor.forecast(tokens, past), forward])
    result: dict[str, Any] = {
        "model": name, "predictor": config, "parameters": sum(p.numel() for p in predictor.network.parameters())
    }  # fmt: skip
    for kind, times in (("forecast_ms", forecast_ms), ("encoder_ms", encoder_ms)):
        low, middle, high = (round(float(value), 2) for value in np.quantile(times, [0.25, 0.5, 0.75]))
        result |= {kind: middle, f"{kind}_quartiles": [low, high]}
    shares = 100 * np.array(forecast_ms) / np.array(encoder_ms)
    low, middle, high = (round(float(value), 2) for value in np.quantile(shares, [0.25, 0.5, 0.75]))
    return result | {"percent": middle, "percent_quartiles": [low, high]}


def main() -> None:
    """Measures both pairs."""
    torch.manual_seed(0)
    bundled = load_model(BUNDLED)
    results = [
        compare("switch-base-8 geometry", *base_8(), "switch_base_8.yaml"),
        compare(BUNDLED, bundled.model.encoder, bundled.layout, "default.yaml"),
    ]
    table = Table(title=f"{SEQUENCES} x {LENGTH} tokens, {torch.get_num_threads()} thread(s), median of {PAIRS} pairs")
    for column in ("encoder of", "predictor", "parameters", "forecast ms", "encoder ms", "share %", "quartiles"):
        table.add_column(column, justify="right")
    for row in results:
        low, high = row["percent_quartiles"]
        table.add_row(
            row["model"], row["predictor"], f"{row['parameters']:,}", f"{row['forecast_ms']:.1f}",
            f"{row['encoder_ms']:.1f}", f"{row['percent']:.2f}", f"{low:.2f} to {high:.2f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print_json({"threads": torch.get_num_threads(), "results": results})


if __name__ == "__main__":
    main()
