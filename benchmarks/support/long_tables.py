"""Tables and sentences from a folder of `make bench-long`: three seeds, the decoder-only model, recordings."""

from typing import Any

from benchmarks.regimes import HEADER
from benchmarks.regimes import row as regime_row
from benchmarks.support.figures import listed, parts, percent, share, span, speeds, within_a_quarter
from benchmarks.support.results import Results
from predictor.evaluation.tables import markdown

STREAMS = {"steady": "steady mix", "drift": "drift", "every_10": "topic change every 10", "every_1": "every batch",
           "unseen": "unseen text"}  # fmt: skip
SEEDS = (0, 1, 2)
"""Seeds of every predictor that is compared."""
SIXTEEN, EIGHT = "balancedness_r16", "balancedness_r8"
Metrics = dict[str, dict[str, dict[str, Any]]]


def machine_below_long(results: Results) -> str:
    """Where and by what the figures of a page in docs/results were measured."""
    link = f"{results.folder.name}/README.md"
    return f"`{results.command}` {results.measured}: [all steps]({link})."


def seeds_long(results: Results) -> str:
    """Unseen text with the bundled Switch model, by seed."""
    unseen = results.document("seeds")["metrics"]["unseen"]
    ours = {name: listed([share(unseen[f"{seed}, adaptive"][name]) for seed in SEEDS]) for name in (SIXTEEN, EIGHT)}
    last = {name: share(unseen["last"][name]) for name in (SIXTEEN, EIGHT)}
    return (
        "On unseen text, after all other test batches, the adaptive forecast balances 16 replica slots to "
        f"{ours[SIXTEEN]} (seeds 0, 1 and 2), the last batch to {last[SIXTEEN]}; 8 slots to {ours[EIGHT]}, the last "
        f"batch to {last[EIGHT]}. In a short run it loses: no forecast foresees the first batches of a new language."
    )


def gap_long(results: Results) -> str:
    """How much of the gap between the last batch and the oracle forecasts close, by seed."""
    found = results.document("seeds")["metrics"]["every_1"]

    def closed(ending: str, name: str) -> str:
        last, oracle = found["last"][name], found["oracle"][name]
        return listed([percent((found[f"{seed}{ending}"][name] - last) / (oracle - last)) for seed in SEEDS])

    return (
        "On the stream that changes its topic every batch, the adaptive forecast closes "
        f"{closed(', adaptive', SIXTEEN)} % of the gap between last batch and oracle with 16 slots (seeds 0, 1 and 2), "
        f"and {closed(', adaptive', EIGHT)} % with 8; the network as trained {closed('', SIXTEEN)} %, and "
        f"{closed('', EIGHT)} %. With 15 batches a stream, differences of .005 mean nothing."
    )


def by_seed_long(results: Results) -> str:
    """Error and balance of the bundled Switch model's forecasts, each seed in a row."""
    found = results.document("seeds")["metrics"]
    names = {"load_tv": "load_tv", SIXTEEN: "balancedness, 16 slots", EIGHT: "8 slots"}
    rows = [
        [title, "last" if seed is None else f"adaptive, seed {seed}",
         *(share(found[stream]["last" if seed is None else f"{seed}, adaptive"][name]) for stream in STREAMS)]
        for name, title in names.items() for seed in (None, *SEEDS)
    ]  # fmt: skip
    return markdown(["", "forecast", *STREAMS.values()], rows)


def family_long(results: Results) -> str:
    """README's table of the decoder-only model."""
    found: Metrics = results.document("seeds-family")["metrics"]
    (eplb,) = (row for row in results.document("ablation-family")["rows"] if row["part"] == "+ replicas (EPLB)")

    def row(title: str, name: str, *forecasters: str) -> list[str]:
        cells = [span([found[stream][each][name] for each in forecasters]) for stream in STREAMS]
        return [title, *(f"**{cell}**" if title == "**Switchcast**" else cell for cell in cells)]

    ours, trained = [f"{seed}, adaptive" for seed in SEEDS], [str(seed) for seed in SEEDS]
    rows = [
        row("load error: last batch", "load_tv", "last"),
        row("moving average", "load_tv", "ema"),
        row("token table", "load_tv", "token_table"),
        row("network as trained", "load_tv", *trained),
        row("**Switchcast**", "load_tv", *ours),
        ["balancedness, 16 replica slots: EPLB", *(share(eplb["phases"][stream]) for stream in STREAMS)],
        row("last batch", SIXTEEN, "last"),
        row("**Switchcast**", SIXTEEN, *ours),
        row("oracle", SIXTEEN, "oracle"),
        row("8 replica slots: last batch", EIGHT, "last"),
        row("**Switchcast**", EIGHT, *ours),
        row("oracle", EIGHT, "oracle"),
    ]
    return markdown(["held-out batches, 8 devices", *STREAMS.values()], rows)


def family_machine_long(results: Results) -> str:
    """Where the table of the decoder-only model comes from, and how exact the running model is."""
    difference = results.document("main-job-family")["max_logit_difference"]
    policies = {"EPLB": "last, eplb, even", "EPLB with our split": "last, eplb, quota",
                "our planner, last batch": "last, home, quota", "Switchcast": "adaptive, home, quota"}  # fmt: skip
    replayed = {", ".join(row[name] for name in ("forecast", "planner", "split")): row["balancedness"]
                for row in results.document("simulate-family")["results"]}  # fmt: skip
    balance = listed([f"{share(replayed[policy])} ({name})" for name, policy in policies.items()])
    link = results.folder / "README.md"
    return (
        f"Seeds 0, 1 and 2 (smallest to largest), `make bench-long` on {results.hardware}: [all steps]({link}). EPLB "
        "plans each batch from the last one and splits evenly. Over all batches of the trace, some of which the "
        f"predictor was trained on, the balancedness with 16 slots is {balance}. In the running model logits differ by "
        f"{difference:.1e} from the plain model's."
    )


def worth_it_long(results: Results) -> str:
    """Verdicts for a GPU that is not here: a plan before every step, and a plan that is kept."""
    found = results.document("worth-it")
    kept = max(found["engines"]["plans"], key=lambda plan: plan["net_gain"])

    def said(verdict: dict[str, Any]) -> str:
        low, high = verdict["interval"]
        return f"({percent(low)} to {percent(high)}, *{verdict['answer']}*)"

    verdict = found["verdict"]
    return (
        f"finds {percent(verdict['net_gain'])} % of expert time saved {said(verdict)} where every step has a plan of "
        f"its own, and {percent(kept['net_gain'])} % {said(kept)} in an engine that keeps a plan and splits evenly, as "
        "SGLang and vLLM do: [docs/worth-it.md](docs/worth-it.md) walks through a yes and a no."
    )


def beyond_memory_long(results: Results) -> str:
    """A model that is larger than memory, within two budgets."""
    found = results.document("beyond-memory")
    weights, memory = (found[name] / 2**30 for name in ("weights_bytes", "memory_bytes"))
    runs = [f"{run['seconds']:.0f} s within {run['budget'].replace('GiB', ' GiB')}" for run in found["runs"]]
    same = "the same text" if found["same_text"] else "another text"
    return (
        f"A model of switch-base-128's geometry in float32, {weights:.1f} GiB on a machine with {memory:.1f} GiB, "
        f"writes 32 tokens for each of four prompts in {listed(runs)}, {same} both times."
    )


def ablation_family_long(results: Results) -> str:
    """Where the gain of the decoder-only model over several devices comes from."""
    return parts(results.document("ablation-family")["rows"], "Qwen3-MoE, 64 experts, top 4")


def one_device_family_long(results: Results) -> str:
    """One device's layer of the decoder-only family against transformers' two ways."""
    rows = results.document("one-device-family")["results"]
    return speeds(rows, {"eager": "transformers' loop", "grouped": "its grouped product"})


def generation_family_long(results: Results) -> str:
    """Generation of the decoder-only model within a quarter of its experts' memory."""
    called = {"lru": "on demand, LRU", "lfu": "on demand, LFU", "cosine": "cosine-matched history",
              "ours_batch": "ours, forecasts of prompts alone", "ours": "**ours**, probes that have learned",
              "oracle": "oracle"}  # fmt: skip
    return within_a_quarter(results.document("tiers-family"), called)


def regimes_long(results: Results) -> str:
    """Regimes in which learning while serving pays."""
    return markdown(HEADER, [regime_row(found) for found in results.document("regimes")["results"]])
