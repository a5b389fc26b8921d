"""Figures, tables and sentences from a folder of `make bench`, and what says where they were measured."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

from benchmarks.support.figures import between, parts, share, speeds, within_a_quarter
from benchmarks.support.paper_tables import CLAIMED, DTYPES
from benchmarks.support.results import Results
from data.files import read_json
from predictor.evaluation.tables import comparison_table, markdown

Value = Callable[[dict[str, Any]], float]


def _load_error(forecaster: str) -> tuple[str, Value]:
    return "forecasts", lambda found: found["metrics"]["every_1"][forecaster]["load_tv"]


def _simulated(*policy: str) -> tuple[str, Value]:
    def value(found: dict[str, Any]) -> float:
        names = ("forecast", "planner", "split")
        rows = [row for row in found["results"] if tuple(row[name] for name in names) == policy]
        return float(rows[0]["balancedness"])

    return "simulate", value


def _layer_ms(arm: str) -> tuple[str, Value]:
    return "replication", lambda found: found[arm]["step_ms"]


def _paper(experts: int, name: str, ending: str = "") -> tuple[str, Value]:
    def value(found: dict[str, Any]) -> float:
        (size,) = (size for size in found["results"] if size["experts"] == experts)
        return float(size["arms"]["switchcast"][name])

    return f"paper-speed{ending}", value


def _tokens_per_second(arm: str) -> tuple[str, Value]:
    return "tiers", lambda found: found[arm]["tokens_per_s"]


HEADLINES: dict[str, tuple[str, Value]] = {
    **{f"load error, topic change every batch, {name}": _load_error(name) for name in ("ema", "last", "adaptive")},
    "balancedness, no replicas": _simulated("none", "contiguous", "even"),
    "balancedness, EPLB": _simulated("last", "eplb", "even"),
    "balancedness, EPLB, our split": _simulated("last", "eplb", "quota"),
    "balancedness, last batch, our planner": _simulated("last", "home", "quota"),
    "balancedness, Switchcast": _simulated("adaptive", "home", "quota"),
    "balancedness, oracle": _simulated("oracle", "home", "quota"),
    "layer ms, no replicas": _layer_ms("contiguous"),
    "layer ms, EPLB": _layer_ms("eplb"),
    "layer ms, Switchcast": _layer_ms("history"),
    "layer ms, perfect balance": _layer_ms("perfect"),
    **{f"tokens/s within a quarter, {name}": _tokens_per_second(name) for name in ("lru", "lfu", "cosine", "ours",
                                                                                   "oracle")},
    "balancedness of make run": ("main-job", lambda found: found["balancedness"]["replicated"]),
    "largest logit difference": ("main-job", lambda found: found["max_logit_difference"]),
}  # fmt: skip
"""Step and value of the figures that matter most, by name; README's first table and `benchmarks.report` show them."""
PAPER: dict[str, tuple[str, Value]] = {
    f"{name} of one layer, {experts} experts, {dtype}": _paper(experts, name, ending)
    for dtype, ending in DTYPES.items()
    for experts in CLAIMED
    for name in ("speed", "busy")
}
"""Figures of the paper's experiment, which `benchmarks.report` shows as well: those in float32 of CPUs and GPUs."""
SIZES = (16, 128, 1024, 4096, 8192)
"""Tokens of a batch that are shown of one device's layer."""


def headline(results: Results) -> str:
    """README's first table."""
    of = {name: results.value(step, read) for name, (step, read) in HEADLINES.items()}
    error = {name: share(of[f"load error, topic change every batch, {name}"]) for name in ("ema", "last", "adaptive")}
    balance = {name: share(of[f"balancedness, {name}"]) for name in (
        "no replicas", "EPLB", "EPLB, our split", "last batch, our planner", "Switchcast", "oracle"
    )}  # fmt: skip
    layer = {
        name: f"{of[f'layer ms, {name}']:.0f}" for name in ("no replicas", "EPLB", "Switchcast", "perfect balance")
    }
    arms = results.document("tiers")
    tokens = {
        name: f"{arm['tokens_per_s']:.0f} ({between(arm['spread'])})" for name, arm in arms.items() if name != "setting"
    }
    less = f"reading {1 - arms['ours']['bytes_per_token'] / arms['cosine']['bytes_per_token']:.0%} less than cosine"
    return markdown(
        ["what", "without", "others, and parts of ours", "**Switchcast**", "limit"],
        [
            ["error of the load forecast where the topic changes every batch (0 is perfect, 1 all wrong)", "",
             f"{error['ema']} moving average, {error['last']} last batch", f"**{error['adaptive']}**", "0"],
            ["balancedness, 8 devices, 16 replica slots, all 276 batches (mean device load / largest; 1 is perfect)",
             f"{balance['no replicas']} no replicas",
             f"{balance['EPLB']} EPLB, {balance['EPLB, our split']} EPLB with our split, "
             f"{balance['last batch, our planner']} last batch with our planner",
             f"**{balance['Switchcast']}**", balance["oracle"]],
            ["one MoE layer over 2 processes, ms a step, planned from past batches",
             f"{layer['no replicas']} no replicas", f"{layer['EPLB']} EPLB", f"**{layer['Switchcast']}**",
             layer["perfect balance"]],
            ["tokens/s with a quarter of the experts in memory (spread of turns)", f"{tokens['lru']} LRU cache",
             f"{tokens['lfu']} LFU cache, {tokens['cosine']} cosine-matched history", f"**{tokens['ours']}**, {less}",
             tokens["oracle"]],
            ["largest difference of a logit from the plain model's", "", "",
             f"**{of['largest logit difference']:.1e}** (rounding)", "0"],
        ],
    )  # fmt: skip


def held_out(results: Results) -> str:
    """Balancedness of the main job's held-out batches, by kind of text, in a sentence each."""
    batches = read_json(results.folder / "main-job-report.json")["each_batch"]

    def both(of: list[dict[str, Any]]) -> str:
        ours, last = (share(fmean(batch[name] for batch in of)) for name in ("replicated", "last"))
        return f"{ours} (from the last batch alone {last})"

    kinds = {"every_1": "batches that change the topic every time", "unseen": "of text of a kind never seen"}
    parts = [
        f"{len(of)} {words} {both(of)}"
        for kind, words in kinds.items() if (of := [batch for batch in batches[1:] if batch["phase"] == kind])
    ]  # fmt: skip
    return (
        "Row 2 replays all batches, some of which the predictor was trained on. `make run` ends with "
        f"{len(batches)} held-out batches, balanced to {both(batches)}. Without the first, which has no last batch: "
        f"{', '.join(parts)}, where the forecast has to learn first."
    )


def machine(results: Results) -> str:
    """Where and by what the figures of a page were measured."""
    command, link = f"`{results.command}`", results.folder / "README.md"
    return f"Measured by {command} {results.measured}, seed 0: [all steps]({link})."


def machine_below(results: Results) -> str:
    """`machine` for a page in docs/results."""
    return machine(results).replace("(docs/results/", "(")


def machine_docs(results: Results) -> str:
    """`machine` for a page in docs."""
    return machine(results).replace("(docs/", "(")


def machine_gpu(results: Results) -> str:
    """`machine_docs` of a folder of `make gpu`."""
    return machine_docs(results)


def machine_settings(results: Results) -> str:
    """`machine_docs` of a folder of `make bench-settings`."""
    return machine_docs(results)


def machine_below_settings(results: Results) -> str:
    """`machine_below` of a folder of `make bench-settings`."""
    return machine_below(results)


def machine_below_gpu(results: Results) -> str:
    """`machine_below` of a folder of `make gpu`."""
    return machine_below(results)


def forecasts(results: Results) -> str:
    """Load errors, and balancedness with 16 and 8 replica slots, of each forecaster and kind of traffic."""
    details = results.document("forecasts")["metrics"]
    captions = {"load_tv": "load_tv", "balancedness_r16": "Balancedness, 16 replica slots",
                "balancedness_r8": "Balancedness, 8 replica slots"}  # fmt: skip
    return "\n\n".join(f"{caption}:\n\n{comparison_table(details, metric)}" for metric, caption in captions.items())


def simulated(results: Results) -> str:
    """The simulator's policies."""
    rows = [
        [row["forecast"], row["planner"], row["split"], f"{row['balancedness']:.3f}", f"{row['p05']:.3f}",
         f"{row['moves_per_layer']:.1f}"]
        for row in results.document("simulate")["results"]
    ]  # fmt: skip
    return markdown(["forecast", "planner", "split", "balancedness", "5th percentile", "moves a layer and batch"], rows)


def main_job(results: Results) -> str:
    """What `make run`'s last step prints."""
    found = results.document("main-job")
    balance, ms = found["balancedness"], found["ms"]
    rows = [
        ["balancedness without replicas", f"{balance['contiguous']:.3f}"],
        ["balancedness with Switchcast", f"**{balance['replicated']:.3f}**"],
        ["balancedness with the oracle's forecast", f"{balance['oracle']:.3f}"],
        ["largest logit difference from the unmodified model", f"{found['max_logit_difference']:.1e}"],
        ["most likely tokens that agree", f"{found['same_argmax']:.0%}"],
        ["experts moved", str(found["moves"])],
        ["forecast, plan, forward (median ms)", f"{ms['forecast']:.0f}, {ms['plan']:.1f}, {ms['compute']:.0f}"],
    ]
    return markdown(["what", "value"], rows)


def replication(results: Results) -> str:
    """One layer over two processes."""
    found = results.document("replication")
    called = {"contiguous": "contiguous, no replicas", "eplb": "EPLB on the last batch, even split (its moves free)",
              "history": "**ours, past batches**", "oracle": "ours, oracle", "perfect": "perfect balance"}  # fmt: skip
    rows = [
        [name, f"{arm['step_ms']:.0f}", between(arm["spread_ms"]),
         f"{arm['step_ms'] / found['perfect']['step_ms']:.2f}", " / ".join(f"{ms:.0f}" for ms in arm["busy_ms"]),
         f"{arm['balancedness']:.3f}", f"{arm['moves']:.1f}"]
        for key, name in called.items() for arm in [found[key]]
    ]  # fmt: skip
    return markdown(["arm", "step, ms", "quartiles", "x perfect", "busy, ms", "balancedness", "moves a step"], rows)


def tiers(results: Results) -> str:
    """Experts within a quarter of their memory."""
    called = {"all_resident": "all resident", "lru": "on demand, LRU", "lfu": "on demand, LFU", "last": "last batch",
              "cosine": "cosine-matched history", "ours_history": "ours, past batches only", "ours": "**ours**",
              "oracle": "oracle"}  # fmt: skip
    return within_a_quarter(results.document("tiers"), called)


def generation(results: Results) -> str:
    """The same while text is generated, and what forecasts from layer to layer are worth there."""
    called = {"lru": "on demand, LRU", "lfu": "on demand, LFU", "cosine": "cosine-matched history",
              "ours_batch": "ours, forecasts of batches alone", "ours_new": "ours, probes that begin with nothing",
              "ours": "**ours**, probes that have learned", "oracle": "oracle"}  # fmt: skip
    return within_a_quarter(results.document("tiers-generate"), called)


def ablation(results: Results) -> str:
    """Where the gain over several devices comes from, in the bundled Switch model."""
    return parts(results.document("ablation")["rows"], "Switch, 64 experts, top 1")


def one_device(results: Results) -> str:
    """Speed of one device's layer over its rivals', which padding and grouping decide."""
    rows = [row for row in results.document("one-device")["results"] if row["tokens"] in SIZES]
    return speeds(rows, {"loop": "Hugging Face's loop", "grouped": "a grouped product"})


def first_run(results: Results) -> str:
    """How long `make run` takes from nothing."""
    seconds = sum(results.steps[step]["seconds"] for step in ("predictor", "main-job"))
    return (
        "Needs Python 3.11 or newer and make; no GPU, no account, no network but PyPI. `make run` first sets up "
        f"packages, in about a minute where they are in a cache; from then on it took {seconds / 60:.1f} minutes on "
        f"{results.hardware}. It ends with a summary of what happened and what to type next; a second run reuses trace "
        "and predictor."
    )


def ladder_picture(results: Results) -> str:
    """Errors by kind of traffic, as a picture."""
    found = results.document("forecasts")["metrics"]
    seen = max(found[stream]["adaptive"]["load_tv"] for stream in found if stream != "unseen")
    last = max(found[stream]["last"]["load_tv"] for stream in found)
    new = [share(found["unseen"][name]["load_tv"]) for name in ("adaptive", "last")]
    words = (
        f"Error of the load forecast by kind of traffic: that of our forecasts is at most {share(seen)} where the last "
        f"batch's rises to {share(last)}; on unseen text {new[0]} against {new[1]}"
    )
    return f"![{words}]({results.folder / 'predictor-ladder.png'})"


def balance_picture(results: Results) -> str:
    """Balancedness of the main job's batches, as a picture."""
    return f"![Balancedness batch by batch]({results.folder / 'main-job-balancedness.png'})"
