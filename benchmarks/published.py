"""Figures that README and docs show, generated from a folder of results.

    python -m benchmarks.published docs/results/intel-xeon-processor-2026-11-27

writes blocks of the Markdown files between `<!-- figures: NAME, FOLDER -->` and `<!-- end of figures -->` anew: from a
folder of `make gpu` those whose names end in `_gpu`, from one of `make bench` the others. A test compares the blocks
with the folders that they name.
"""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.support.paper_tables import (
    CLAIMED,
    DTYPES,
    paper_claims_gpu,
    paper_quality,
    paper_quality_gpu,
    paper_speed,
    paper_speed_gpu,
)
from benchmarks.support.results import GPU, Results
from data.cli import OneLineParser, user_errors
from data.files import read_json, write_text
from predictor.evaluation.tables import comparison_table, markdown

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/results/README.md", "docs/gpu.md")
BLOCK = re.compile(r"<!-- figures: (\S+), (\S+) -->\n(.*?)<!-- end of figures -->", re.DOTALL)
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


def share(value: float) -> str:
    """A share with three digits, as in .964."""
    return f"{value:.3f}".removeprefix("0")


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
    tokens = {name: f"{of[f'tokens/s within a quarter, {name}']:.0f}" for name in ("lru", "lfu", "cosine", "ours",
                                                                                   "oracle")}  # fmt: skip
    bytes_read = {name: results.document("tiers")[name]["bytes_per_token"] for name in ("ours", "cosine")}
    less = f"reading {1 - bytes_read['ours'] / bytes_read['cosine']:.0%} less than cosine"
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
            ["tokens/s with a quarter of the experts in memory", f"{tokens['lru']} LRU cache",
             f"{tokens['lfu']} LFU cache, {tokens['cosine']} cosine-matched history", f"{tokens['ours']}, {less}",
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
    return f"Measured by {command} at commit {results.commit[:8]} on {results.hardware}, seed 0: [all steps]({link})."


def machine_below(results: Results) -> str:
    """`machine` for a page in docs/results."""
    return machine(results).replace("(docs/results/", "(")


def machine_gpu(results: Results) -> str:
    """`machine` for a page in docs, of a folder of `make gpu`."""
    return machine(results).replace("(docs/", "(")


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
        [name, f"{arm['step_ms']:.0f}", "-".join(f"{ms:.0f}" for ms in arm["spread_ms"]),
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
    return _within_a_quarter(results.document("tiers"), called)


def generation(results: Results) -> str:
    """The same while text is generated, and what forecasts from layer to layer are worth there."""
    called = {"lru": "on demand, LRU", "lfu": "on demand, LFU", "cosine": "cosine-matched history",
              "ours_batch": "ours, forecasts of batches alone", "ours_new": "ours, probes that begin with nothing",
              "ours": "**ours**, probes that have learned", "oracle": "oracle"}  # fmt: skip
    return _within_a_quarter(results.document("tiers-generate"), called)


def _within_a_quarter(found: dict[str, Any], called: dict[str, str]) -> str:
    rows = [
        [name, f"{arm['tokens_per_s']:.0f}", f"{arm['tokens_per_s'] / found['lru']['tokens_per_s']:.2f}",
         f"{arm['hit_rate']:.0%}", f"{arm['bytes_per_token'] / 1e6:.2f}", f"{arm['stall_ms']:.0f}"]
        for key, name in called.items() for arm in [found[key]]
    ]  # fmt: skip
    return markdown(["arm", "tokens/s", "x LRU", "there when asked for", "MB read a token", "stall, ms a batch"], rows)


def ablation(results: Results) -> str:
    """Where the gain comes from, in the bundled models that were measured."""
    columns = {"Switch, 64 experts, top 1": "ablation"}
    if "ablation-family" in results.names:
        columns["Qwen3-MoE, 64 experts, top 4"] = "ablation-family"
    found = [results.document(step)["rows"] for step in columns.values()]
    rows = [
        [row["part"], *(_interval(rows[place]["balancedness"], rows[place]["interval"]) for rows in found)]
        for place, row in enumerate(found[0])
    ]
    return markdown(["switched on", *columns], rows)


def one_device(results: Results) -> str:
    """Speed of one device's layer over its rivals', which padding and grouping decide."""
    rows = []
    for row in results.document("one-device")["results"]:
        if row["tokens"] not in SIZES:
            continue
        cells = [f"{row['tokens']:,}", "a quarter" if row["padded"] else "none", f"{row['slots_ms']:.2f}"]
        for rival in ("loop", "grouped"):
            low, high = (1 / end for end in reversed(row[f"over_{rival}_quartiles"]))
            cells.append(f"{1 / row[f'over_{rival}']:.2f} ({low:.2f}-{high:.2f})")
        rows.append(cells)
    return markdown(["tokens", "padding", "ms", "speed over Hugging Face's loop", "over a grouped product"], rows)


def _interval(mean: float, ends: list[float]) -> str:
    return f"{share(mean)} [{share(ends[0])}, {share(ends[1])}]"


BLOCKS: dict[str, Callable[[Results], str]] = {
    made.__name__: made
    for made in (headline, held_out, machine, machine_below, machine_gpu, machine_below_gpu, forecasts, simulated,
                 main_job, replication, tiers, generation, ablation, one_device, paper_speed, paper_speed_gpu,
                 paper_claims_gpu, paper_quality, paper_quality_gpu)
}  # fmt: skip


def generated(text: str, folder: Path | None = None) -> str:
    """A page with its blocks made anew.

    Args:
        text: The page.
        folder: Folder of results, for the blocks of the command that wrote it; by default each block's own.

    Raises:
        ValueError: If a block has no such name, or its folder not the step that it needs.
    """

    def block(found: re.Match[str]) -> str:
        name, own = found[1], Path(found[2])
        if folder is not None and name.endswith("_gpu") == (Results(folder).command == GPU):
            own = folder
        if name not in BLOCKS:
            raise ValueError(f"no block of figures is called '{name}'; expected one of {', '.join(BLOCKS)}")
        try:
            made = BLOCKS[name](Results(own))
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{own} does not hold the figures of '{name}' ({error!r}); run {Results(own).command} again"
            ) from None
        return f"<!-- figures: {name}, {own} -->\n{made}\n<!-- end of figures -->"

    return BLOCK.sub(block, text)


def main() -> None:
    """Command line."""
    parser = OneLineParser(prog="python -m benchmarks.published", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of results in docs/results")
    with user_errors():
        given = parser.parse_args().folder.resolve()
        if not given.is_relative_to(ROOT / "docs/results"):
            raise ValueError(f"{given} is not in docs/results, where pages can link to it; copy it there")
        given = given.relative_to(ROOT)
        made = {page: generated((ROOT / page).read_text(), given) for page in PAGES}
        for page, text in made.items():
            write_text(ROOT / page, text)
    print(f"{sum(len(BLOCK.findall(text)) for text in made.values())} blocks in {', '.join(PAGES)}")


if __name__ == "__main__":
    main()
