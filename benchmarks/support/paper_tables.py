"""Tables of the paper's experiment from a folder of results: of `make bench`, and (`_gpu`) of `make gpu`."""

from typing import Any

from benchmarks.support.results import Results
from predictor.evaluation.tables import markdown

ARMS = {
    "hugging face": "Hugging Face's loop", "sorted loop": "sorted loop", "grouped_mm": "grouped product",
    "padded": "padded batched product", "padded, replicas": "the same with 16 replicas",
    "switchcast": "**Switchcast**",
}  # fmt: skip
LOSSY = {
    "predicted expert": "the predicted expert", "best of three predicted": "the router's best of three predicted",
    "engine": "**Switchcast**",
}  # fmt: skip
CLAIMED = {8: 0.96, 64: 0.89, 128: 0.82}
"""GPU utilisation that the paper states, by the number of experts."""
DTYPES = {"bfloat16": "-bfloat16", "float32": ""}
"""Data types on a GPU, and how the names of their steps end."""
LOST = ["same likeliest next token", "loss above the plain model's", "same greedy text"]


def paper_speed(results: Results) -> str:
    """Arms of the paper's experiment: speed over Hugging Face's loop, useful and busy share."""
    found = results.document("paper-speed")["results"]
    header = ["arm"] + [f"{size['experts']} experts: {name}" for size in found for name in ("speed", "useful", "busy")]
    rows = []
    for key, name in ARMS.items():
        cells = [name]
        for arm in (size["arms"][key] for size in found):
            cells += [_speed(arm), f"{arm['useful']:.0%}", f"{arm['busy']:.0%}"]
        rows.append(cells)
    return markdown(header, rows)


def paper_speed_gpu(results: Results) -> str:
    """Arms on a GPU, one row for each number of experts: time, speed, busy share in both data types, memory."""
    header = ["experts", "arm", *(f"{dtype}: {name}" for dtype in DTYPES for name in ("ms", "speed", "busy"))]
    both = [results.document(f"paper-speed{ending}")["results"] for ending in DTYPES.values()]
    rows = []
    for sizes in zip(*both, strict=True):
        for key, name in ARMS.items():
            cells, arms = [str(sizes[0]["experts"]), name], [size["arms"][key] for size in sizes]
            for arm in arms:
                cells += [f"{arm['ms']:.2f}", _speed(arm), f"{arm['busy']:.0%}"]
            memory = (arms[0][part] / 1e9 for part in ("weight_bytes", "working_bytes"))
            rows.append([*cells, f"{arms[0]['useful']:.0%}", " + ".join(f"{part:.2f}" for part in memory)])
    return markdown([*header, "useful", "bfloat16: weights + working memory, GB"], rows)


def paper_claims_gpu(results: Results) -> str:
    """Busy share beside the paper's claim, and the speed of our layer over each rival's, a ratio of medians."""
    rivals = ("hugging face", "grouped_mm", "padded, replicas")
    both = {dtype: results.document(f"paper-speed{ending}")["results"] for dtype, ending in DTYPES.items()}
    header = ["experts", "utilisation that the paper states", *(f"busy, {dtype}" for dtype in DTYPES)]
    called = "speed over {}, {}".format
    names = {"hugging face": "Hugging Face's loop", "grouped_mm": "a grouped product",
             "padded, replicas": "a padded product with replicas"}  # fmt: skip
    header += [called(names[rival], dtype) for rival in rivals for dtype in DTYPES]
    rows = []
    for sizes in zip(*both.values(), strict=True):
        experts, arms = sizes[0]["experts"], [size["arms"] for size in sizes]
        cells = [str(experts), f"{CLAIMED[experts]:.0%}" if experts in CLAIMED else ""]
        cells += [f"{each['switchcast']['busy']:.0%}" for each in arms]
        cells += [f"{each[rival]['ms'] / each['switchcast']['ms']:.2f}" for rival in rivals for each in arms]
        rows.append(cells)
    return markdown(header, rows)


def paper_quality(results: Results) -> str:
    """What outputs lose where the prediction replaces the router."""
    found = results.document("paper-quality")["arms"]
    return markdown(["arm", *LOST], [[name, *_lost(found[key])] for key, name in LOSSY.items()])


def paper_quality_gpu(results: Results) -> str:
    """The same on a GPU, in both data types."""
    both = {dtype: results.document(f"paper-quality{ending}")["arms"] for dtype, ending in DTYPES.items()}
    rows = [[name, dtype, *_lost(found[key])] for key, name in LOSSY.items() for dtype, found in both.items()]
    return markdown(["arm", "data type", *LOST], rows)


def _speed(arm: dict[str, Any]) -> str:
    low, high = arm["speed_quartiles"]
    return f"{arm['speed']:.2f} ({low:.2f}-{high:.2f})"


def _lost(arm: dict[str, Any]) -> list[str]:
    cells = []
    for score, percent in (("same_token", True), ("loss_increase", False), ("same_text", True)):
        mean, low, high = (value + 0.0 for value in (arm[score]["mean"], *arm[score]["interval"]))
        cells.append(f"{mean:.1%} [{low:.1%}, {high:.1%}]" if percent else f"{mean:.3f} [{low:.3f}, {high:.3f}]")
    return cells
