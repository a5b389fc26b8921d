"""Everything that reads files from outside, as targets of `stress.fuzz`: a valid example, and how it is read.

A target reads a folder of its own. What it returns is checked: a changed file may still be valid, but then its content
must be, too.
"""

import csv
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

import train
from data.arrays import MOST_EXPERTS
from data.convert import convert
from data.files import sha256
from data.models.model import load_dense, load_model, outline
from data.models.stored_experts import stored_experts
from data.models.weights import ModelWeights, read_embedding
from data.text.source import TextSource
from data.traces.loads import read_loads
from data.traces.store import open_trace
from predictor.adaptive import AdaptiveForecaster
from predictor.checkpoint import CONFIG, STATE, WEIGHTS, load_adaptive, save_predictor, save_state
from predictor.choice import open_forecaster
from predictor.forecaster import NeuralForecaster
from predictor.network import Architecture, LoadNetwork
from predictor.training.run_folder import read_checkpoint
from runtime.balancing.plan import ReplicationPlan, flat_homes
from runtime.balancing.plan_file import PlannedLayers, SavedPlan, load_plan
from runtime.distributed.ranks import Ranks
from runtime.export.check import check_plan
from runtime.export.export import Engine, export_plan
from runtime.export.formats import FORMATS
from runtime.offload.layer_ahead import ModelProbes
from runtime.offload.probe_file import restore_probes, save_probes
from runtime.simulate.comparison import compare_policies
from tests.conftest import TEXTS, write_switch
from tests.helpers.made_up_trace import EXPERTS, VOCABULARY, WIDTH, make_batch, make_layout, time_splits, write_trace
from tests.helpers.small_qwen3 import write_qwen3

LINES = [f"{text} number {number}" for number, text in enumerate(TEXTS)]
LOADS = np.random.default_rng(0).integers(0, 50, (6, 3, 8))


@dataclass(frozen=True)
class Target:
    """Something that reads files.

    Attributes:
        name: What it reads.
        write: Writes a valid example into a folder.
        read: Reads the folder; raises ValueError or OSError where it is refused, AssertionError on wrong content.
        changed: Pattern of the files that are changed.
        repair: Corrects the digests of changed files, so that what lies behind them is reached.
    """

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    changed: str = "*"
    repair: Callable[[Path], object] | None = None


def check_loads(folder: Path) -> None:
    """Reads loads: whole, none negative."""
    (place,) = folder.iterdir()
    loads = read_loads(place).loads
    assert loads.dtype == np.int64
    assert loads.ndim == 3
    assert loads.min() >= 0


def write_counts(folder: Path) -> None:
    np.save(folder / "loads.npy", LOADS)


def write_archive(folder: Path) -> None:
    np.savez_compressed(folder / "loads.npz", counts=LOADS)


def write_routed(folder: Path) -> None:
    np.save(folder / "routed_experts.npy", np.random.default_rng(0).integers(0, 8, (700, 3, 2)))


def write_tokens(folder: Path) -> None:
    rng, length = np.random.default_rng(0), np.full(40, 12)
    np.savez(
        folder / "requests.npz", tokens=rng.integers(0, 90, 480), length=length, first_routed=np.zeros(40, int),
        routed=length, experts=rng.integers(0, 8, (480, 2, 2)), subject=np.arange(40) % 9,
        subjects=np.array([f"subject {number}" for number in range(9)]),
    )  # fmt: skip


def read_tokens(folder: Path) -> None:
    out = folder / "out"
    loads = convert(folder / "requests.npz", out).loads()
    shutil.rmtree(out)
    assert loads.min() >= 0


def write_sglang_stat(folder: Path) -> None:
    torch.save({"rank": 0, "logical_count": torch.from_numpy(LOADS)}, folder / "recorder_1.0.pt")


def write_sglang_passes(folder: Path) -> None:
    recording = folder / "recording"
    recording.mkdir()
    slots = torch.arange(10).expand(3, 10) % 8
    for rank in (0, 1):
        records = [
            {"forward_pass_id": number, "rank": rank, "global_physical_count": torch.full((3, 10), 2 + number)}
            for number in range(4)
        ]
        torch.save({"records": records, "last_physical_to_logical_map": slots}, recording / f"recorder_{rank}.pt")


def write_tensorrt_llm(folder: Path) -> None:
    recording = folder / "recording"
    recording.mkdir()
    counts = {f"{step}_{layer}": torch.from_numpy(LOADS[step, layer]) for step in range(6) for layer in range(3)}
    for rank in (0, 1):
        save_file(counts, recording / f"rank{rank}.safetensors")
    (recording / "meta_info.json").write_text(json.dumps({"num_experts": 8, "num_experts_per_token": 2}))


def write_megatron(folder: Path) -> None:
    rng, lines = np.random.default_rng(0), []
    for step in range(4):
        for layer in range(3):
            ids = rng.integers(0, 8, (5, 2)).tolist()
            lines.append(json.dumps({"step": step, "layer": layer, "top_indices": ids}))
    (folder / "router_trace_rank0.jsonl").write_text("\n".join(lines) + "\n")


def write_small_trace(folder: Path) -> None:
    write_trace(folder, make_layout("made-up"), time_splits(3, 1, 2), shard=4)


def repair_trace(folder: Path) -> None:
    """Gives every shard in trace.json the digest that it has."""
    about = json.loads((folder / "trace.json").read_text())
    for shard in about["shards"]:
        shard["sha256"] = sha256(folder / shard["file"])
    (folder / "trace.json").write_text(json.dumps(about))


def read_trace(folder: Path) -> None:
    trace = open_trace(folder)
    loads = trace.loads()
    assert loads.shape == (trace.num_batches, trace.layout.num_layers, trace.layout.num_experts)
    assert loads.min() >= 0


def write_counts_trace(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        np.save(Path(place) / "loads.npy", LOADS)
        convert(Path(place) / "loads.npy", Path(place) / "trace")
        shutil.copytree(Path(place) / "trace", folder, dirs_exist_ok=True)


def write_predictor(folder: Path) -> None:
    torch.manual_seed(0)
    layout = make_layout("made-up")
    table = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))
    learned = NeuralForecaster(layout, LoadNetwork(layout, Architecture(width=8)), table, torch.ones(2, 3, 3))
    save_predictor(folder, learned, {"validation": {"adaptive": 0.1, "last": 0.2}})
    adaptive = AdaptiveForecaster(learned, *learned.shape)
    forecast_twice(adaptive)
    save_state(folder, adaptive.state())


def forecast_twice(adaptive: AdaptiveForecaster) -> None:
    history = np.ones((1, 3, EXPERTS), dtype=np.int64)
    tokens = make_batch(0, "steady", "test", np.random.default_rng(0)).tokens
    for _ in range(2):
        forecast = adaptive.forecast(tokens, history)
        assert np.isfinite(forecast.load).all()
        adaptive.observe(tokens, history[0])


def read_predictor(folder: Path) -> None:
    table = torch.zeros(VOCABULARY, WIDTH)
    layout = make_layout("made-up")
    open_forecaster(folder, "auto", layout, table)
    forecast_twice(load_adaptive(folder, layout, table))


def made_up_probes() -> ModelProbes:
    """Probes without an engine, of two layers."""
    layout, ranks = make_layout("made-up"), Ranks(device="cpu")
    slots: Any = [SimpleNamespace(layer=layer) for layer in range(2)]
    return ModelProbes(layout, slots, slice(1, None), torch.nn.Embedding(2, WIDTH), None, ranks)  # type: ignore[arg-type]


def read_probes(folder: Path) -> None:
    probes = made_up_probes()
    restore_probes(folder, probes, make_layout("made-up"))
    assert all(value.isfinite().all() for value in probes.state().values())


def repair_predictor(folder: Path) -> None:
    """Gives the weights in config.json the digest that they have, in the state too."""
    config = json.loads((folder / CONFIG).read_text())
    config["weights_sha256"] = sha256(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))


def write_checkpoint(folder: Path) -> None:
    state = {
        "state_dict": {"network.a": torch.ones(3)}, "hyper_parameters": {"architecture": {"width": 8}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}], "loops": {"fit_loop": {"epoch": 1}},
    }  # fmt: skip
    torch.save(state, folder / "last.ckpt")


def write_settings(folder: Path) -> None:
    for name in ("default", "smoke"):
        shutil.copy(Path(train.__file__).parent / "configs" / f"{name}.yaml", folder)


@cache
def train_parser() -> Any:
    """The parser of train.py's options."""
    return train.command_line([]).parser


def read_settings(folder: Path) -> None:
    """Reads both files, one after the other, as `train.py --config` does."""
    files = sorted(folder.iterdir())
    train_parser().parse_args([word for file in files for word in ("--config", str(file))])


def write_lines(folder: Path) -> None:
    (folder / "text.txt").write_text("\n".join(LINES), encoding="utf-8")


def write_paragraphs(folder: Path) -> None:
    (folder / "text.md").write_text("# Title\n\n" + "\n\n".join(LINES), encoding="utf-8")


def write_csv(folder: Path) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["id", "text"])
    writer.writeheader()
    writer.writerows({"id": number, "text": line} for number, line in enumerate(LINES))
    (folder / "text.csv").write_text(buffer.getvalue(), encoding="utf-8")


def write_json_lines(folder: Path) -> None:
    rows = [json.dumps({"id": number, "text": line}) for number, line in enumerate(LINES)]
    (folder / "text.jsonl").write_text("\n".join(rows) + "\n")


def write_parquet(folder: Path) -> None:
    pq.write_table(pa.table({"id": list(range(len(LINES))), "text": LINES}), folder / "text.parquet")


def check_text(folder: Path) -> None:
    """Reads documents: none empty, all of them text that can be written."""
    (place,) = folder.iterdir()
    for document in TextSource(str(place)).documents():
        assert document.text.strip()
        document.text.encode("utf-8")


def write_family(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as switch:
        write_qwen3(folder, write_switch(Path(switch)))


def check_outline(folder: Path) -> None:
    assert outline(str(folder)).layout.num_experts >= 1


def check_model(folder: Path) -> None:
    """Loads the whole model, and reads its experts one by one: both the same, or one of them refuses."""
    whole = load_model(str(folder))
    read_embedding(str(folder))
    dense = load_dense(str(folder))
    reader = stored_experts(ModelWeights(str(folder)), dense.model, dense.layout)
    held = whole.model.get_submodule(whole.layout.modules[0])
    flat = torch.cat([value.detach().flatten() for value in held.parameters()]).sort().values
    one = torch.cat([part.flatten() for part in reader.read(0, 0)]).float()
    assert torch.isin(one, flat).all() or not one.isfinite().all(), "an expert read alone has other values"


def check_tokenizer(folder: Path) -> None:
    tokenizer = load_model(str(folder)).tokenizer
    assert isinstance(tokenizer("expert router")["input_ids"], list)


def write_plan(engine: Engine) -> Callable[[Path], object]:
    """Writes an engine's plan: two devices, eight experts, MoE layers 1 to 3 of five."""
    plan = ReplicationPlan.at_home(flat_homes(LOADS.mean(0), 2), 2, 4)
    saved = SavedPlan(plan, PlannedLayers([1, 2, 3], 5))
    return lambda folder: export_plan(saved, engine, folder / f"plan{FORMATS[engine].suffix}")


def write_pickled_plan(folder: Path) -> None:
    torch.save({"physical_to_logical_map": torch.arange(12).expand(3, 12) % 8}, folder / "plan.pt")


def read_plan(folder: Path) -> None:
    """Checks the plan; where nothing is wrong, every layer has every expert in its slots."""
    (place,) = folder.iterdir()
    found = check_plan(place, num_devices=2, num_experts=8)
    for row in () if found.problems or found.plan.engine == "switchcast" else found.plan.rows.values():
        assert set(row) == set(range(8))
    if found.plan.engine == "switchcast":
        assert load_plan(place).plan.phy2log.max() < MOST_EXPERTS


def write_simulated(folder: Path) -> None:
    compare_policies(LOADS, 2, 2, ["last"], ["home"], ["quota"], save_plans=folder / "plans.npz")


def read_simulated(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        assert export_plan(folder / "plans.npz", "vllm", Path(place) / "plan.json").saved.plan.phy2log.min() >= 0


TARGETS = {
    target.name: target
    for target in (
        Target("counts", write_counts, check_loads),
        Target("counts archive", write_archive, check_loads),
        Target("vllm", write_routed, check_loads),
        Target("megatron", write_megatron, check_loads),
        Target("sglang stat", write_sglang_stat, check_loads),
        Target("sglang passes", write_sglang_passes, check_loads, "recording/*.pt"),
        Target("tensorrt-llm", write_tensorrt_llm, check_loads, "recording/*"),
        Target("requests", write_tokens, read_tokens),
        Target("trace.json", write_small_trace, read_trace, "trace.json"),
        Target("trace shards", write_small_trace, read_trace, "*.parquet", repair_trace),
        Target("counts shards", write_counts_trace, read_trace, "*.parquet", repair_trace),
        Target("predictor config", write_predictor, read_predictor, CONFIG),
        Target("predictor weights", write_predictor, read_predictor, WEIGHTS, repair_predictor),
        Target("predictor state", write_predictor, read_predictor, STATE),
        Target("probes", lambda folder: save_probes(folder, made_up_probes(), make_layout("made-up")), read_probes),
        Target("checkpoint", write_checkpoint, lambda folder: read_checkpoint(folder / "last.ckpt")),
        Target("settings", write_settings, read_settings, "*.yaml"),
        Target("text", write_lines, check_text),
        Target("markdown", write_paragraphs, check_text),
        Target("csv", write_csv, check_text),
        Target("json lines", write_json_lines, check_text),
        Target("parquet", write_parquet, check_text),
        Target("model config", write_switch, check_outline, "config.json"),
        Target("model weights", write_switch, check_model, "model.safetensors"),
        Target("family weights", write_family, check_model, "model.safetensors"),
        Target("tokenizer", write_switch, check_tokenizer, "tokenizer*.json"),
        Target("plan", write_plan("switchcast"), read_plan),
        Target("plan of sglang", write_plan("sglang"), read_plan),
        Target("plan of sglang, pickled", write_pickled_plan, read_plan),
        Target("plan of vllm", write_plan("vllm"), read_plan),
        Target("plan of tensorrt-llm", write_plan("tensorrt-llm"), read_plan),
        Target("plan of vllm-ascend", write_plan("vllm-ascend"), read_plan),
        Target("plans of the simulator", write_simulated, read_simulated),
    )
}
"""All targets by name."""
