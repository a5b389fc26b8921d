"""What answers lose where a prediction replaces the router, as in SiDA and the paper, beside an engine that keeps it.

    python -m benchmarks.paper_quality                                        # the bundled model, outputs/predictor
    python -m benchmarks.paper_quality --predictor outputs/paper/predictor    # the paper's network
    python -m benchmarks.paper_quality --device cuda --dtype bfloat16

Each arm runs the test batches of the trace that the predictor was trained on, encoder and decoder, with the same
predictor. `predicted expert`: the encoder's tokens go to the expert that the network finds likeliest, weighted by its
probability (SiDA with one hash entry, the paper on SST2). `best of three predicted`: the router chooses, among the
three likeliest alone (the paper on MRPC). `engine`: the router chooses, the prediction only places experts. The
decoder's routers stay in all arms, because its tokens are not known ahead.

Prints how often router and prediction agree with padding counted and without, and for each arm the share of decoder
tokens with the same likeliest next token, the increase of the loss, and the share of sequences whose greedy text is the
same; intervals are 95 % block bootstraps over batches. In a pipe, the last line is JSON.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from data.arrays import FloatArray
from data.cli import print_json, user_errors
from data.models.device import Device
from data.models.model import Dtype, LoadedModel, load_model
from data.traces.router_tap import RouterTap
from data.traces.store import open_trace
from data.traces.trace import RouterTrace, TokenBatch
from predictor.checkpoint import load_predictor
from predictor.evaluation.bootstrap import resampled
from predictor.forecaster import NeuralForecaster
from runtime.engine.batch import ModelBatch, forward
from runtime.engine.engine import Engine

MODEL, TRACE = "switch-mini-64", Path("outputs/traces/switch-mini-64")
DEVICES, REDUNDANT = 8, 16
NEW_TOKENS = 12
LIKELIEST = 3
Route = Callable[[Tensor, Tensor], Tensor]
"""Expert of each token `[B, T]`, from the predicted probabilities and the router's, `[B, T, E]` each."""


def predicted(predicted_BTE: Tensor, router_BTE: Tensor) -> Tensor:
    """The expert that the prediction finds likeliest."""
    return predicted_BTE.argmax(-1)


def best_of_three(predicted_BTE: Tensor, router_BTE: Tensor) -> Tensor:
    """The router's expert among the likeliest of the prediction."""
    allowed = torch.zeros_like(router_BTE).scatter_(-1, predicted_BTE.topk(LIKELIEST, -1).indices, 1.0)
    return (router_BTE + allowed).argmax(-1)  # a probability is at most 1


LOSSY: dict[str, Route] = {"predicted expert": predicted, "best of three predicted": best_of_three}


@contextmanager
def replaced(loaded: LoadedModel, probabilities: Tensor, route: Route) -> Iterator[None]:
    """Replaces the choices of the encoder's routers.

    Args:
        loaded: The model.
        probabilities: Predicted, `[B, T, L_in, E]`.
        route: How a token's expert is chosen.
    """
    layout = loaded.layout

    def hook(layer: int) -> Any:
        def choose(router: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> Any:
            share_BTE = probabilities[:, :, layer].to(output[1].dtype)
            router_BTE = output[2].softmax(-1).to(output[1].dtype)
            chosen_BT = route(share_BTE, router_BTE)
            weights = share_BTE if route is predicted else router_BTE
            dispatched = one_hot(chosen_BT, layout.num_experts)
            dispatched = dispatched * (dispatched.cumsum(-2) <= router.expert_capacity)
            return dispatched, weights.gather(-1, chosen_BT[..., None]), output[2]

        return choose

    names = [f"{name.removesuffix('experts')}router" for name in layout.modules[: layout.num_input_layers]]
    handles = [loaded.model.get_submodule(name).register_forward_hook(hook(at)) for at, name in enumerate(names)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def agreement(tap: RouterTap, loaded: LoadedModel, tokens: TokenBatch, probabilities: Tensor) -> FloatArray:
    """Positions where the router's expert is the likeliest, or among the three likeliest, of the prediction.

    Returns:
        Shares of real tokens: likeliest, among three; of all positions, padding too: the same. `[4]`, mean over layers.
    """
    calls = tap.take()[: loaded.layout.num_input_layers]
    found = []
    for layer, (call, *_) in enumerate(calls):
        ranks = (probabilities[:, :, layer].topk(LIKELIEST, -1).indices == call.experts[..., None]).float()
        for hits in (ranks[..., 0], ranks.sum(-1)):
            found.append([float(hits[tokens.mask].mean()), float(hits.mean())])
    by_layer = np.array(found).reshape(len(calls), 2, 2)
    return np.asarray(by_layer.mean(0).T.reshape(-1))


def scores(logits: Tensor, plain: Tensor, decoder: TokenBatch) -> tuple[float, float]:
    """Share of real decoder tokens with the same likeliest next token, and how much the loss is above the plain one."""
    same = (logits.argmax(-1) == plain.argmax(-1))[decoder.mask].double().mean()
    labels = decoder.input_ids[:, 1:].masked_fill(~decoder.mask[:, 1:], -100).flatten().to(plain.device)
    losses = [cross_entropy(each[:, :-1].flatten(0, 1).float(), labels) for each in (logits, plain)]
    return float(same), float(losses[0] - losses[1])


def texts(model: Any, tokens: TokenBatch, device: torch.device) -> Tensor:
    """Greedy continuations, `[B, NEW_TOKENS + 1]`, of a model or an engine on a device."""
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    there = tokens.to(device)
    found: Tensor = model.generate(input_ids=there.input_ids, attention_mask=there.mask.long(), **settings)
    return found


class Lost:
    """What an arm loses, batch by batch: `same_token`, `loss_increase`, `same_text`."""

    def __init__(self) -> None:
        self.scores: dict[str, list[float]] = {"same_token": [], "loss_increase": [], "same_text": []}

    def add(self, logits: Tensor, plain: Tensor, decoder: TokenBatch) -> None:
        """Adds a batch's logits `[B, U, V]`."""
        for name, value in zip(self.scores, scores(logits, plain, decoder), strict=False):
            self.scores[name].append(value)

    def add_text(self, ids: Tensor, plain: Tensor) -> None:
        """Adds greedy continuations `[B, U]`."""
        self.scores["same_text"].append(float((ids == plain).all(-1).double().mean()))

    def figures(self) -> dict[str, Any]:
        """The mean of each score and its interval."""
        found = {}
        for name, values in self.scores.items():
            each = np.array(values)
            low, high = np.quantile(each[resampled(len(each))].mean(-1), [0.025, 0.975])
            found[name] = {
                "mean": round(float(each.mean()), 4),
                "interval": [round(float(low), 4), round(float(high), 4)],
            }
        return found


@torch.no_grad()  # not inference_mode: another thread copies replicas
def measure(
    batches: list[RouterTrace], forecaster: NeuralForecaster, every: int, device: Device, dtype: Dtype
) -> dict[str, Any]:
    """All arms on all batches; greedy texts on every so many of them."""
    loaded, ready = load_model(MODEL, dtype=dtype), [ModelBatch(each.tokens, each.decoder_tokens) for each in batches]
    place = torch.device(device)
    loaded.to(place)
    arms = {name: Lost() for name in (*LOSSY, "engine")}
    match: list[FloatArray] = []
    with Engine(MODEL, forecaster, DEVICES, REDUNDANT, device=device, dtype=dtype) as engine:
        outputs = engine.run(ready)
        for number, batch in enumerate(track(ready, "batches", console=Console(stderr=True))):
            tokens, decoder = batch.tokens, batch.decoder
            assert decoder is not None
            with RouterTap(loaded.model, loaded.layout, LIKELIEST) as tap:
                plain = forward(loaded.model, batch)
                share = forecaster.predict(tokens, torch.zeros(0, *forecaster.shape)).token_logits.softmax(-1).to(place)
                match.append(agreement(tap, loaded, tokens, share))
            written = texts(loaded.model, tokens, place) if number % every == 0 else None
            for name, route in LOSSY.items():
                with replaced(loaded, share, route):
                    arms[name].add(forward(loaded.model, batch), plain, decoder)
                    if written is not None:
                        arms[name].add_text(texts(loaded.model, tokens, place), written)
            arms["engine"].add(next(outputs).logits, plain, decoder)
            if written is not None:
                arms["engine"].add_text(texts(engine, tokens, place), written)
    shares = np.mean(match, 0).round(4).tolist()
    names = ("likeliest", "among_three", "likeliest_with_padding", "among_three_with_padding")
    lost = {name: arm.figures() for name, arm in arms.items()}
    return {"batches": len(ready), "agreement": dict(zip(names, shares, strict=True)), "arms": lost}


def show(report: dict[str, Any], console: Console) -> None:
    """Prints how often prediction and router agree, and what each arm loses."""
    found = {name: f"{share:.1%}" for name, share in report["agreement"].items()}
    table = Table(
        title=f"Answers on {report['batches']} test batches of {MODEL}, against the plain model's",
        caption=f"prediction and router agree: {found['likeliest']} of tokens, {found['among_three']} among three; "
        f"with padding {found['likeliest_with_padding']}, {found['among_three_with_padding']}",
    )
    for column in ("arm", "same next token", "loss above the plain model's", "same greedy text"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, arm in report["arms"].items():
        cells = [
            f"{arm[score]['mean']:{form}} [{arm[score]['interval'][0]:{form}}, {arm[score]['interval'][1]:{form}}]"
            for score, form in (("same_token", ".1%"), ("loss_increase", ".3f"), ("same_text", ".1%"))
        ]
        table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--predictor", type=Path, default=Path("outputs/predictor"))
    parser.add_argument("--trace", type=Path, default=TRACE, help="the trace it was trained on")
    parser.add_argument("--batches", type=int, help="test batches, spread over all of them; by default all")
    parser.add_argument("--every", type=int, default=8, help="batches between two whose greedy text is compared")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with user_errors():
        for name in ("batches", "every"):
            if getattr(given, name) is not None and getattr(given, name) < 1:
                raise ValueError(f"--{name} is {getattr(given, name)}, expected 1 or more")
        batches = list(replace(open_trace(given.trace), only="test").traces())
        step = max(len(batches) // (given.batches or len(batches)), 1)
        forecaster = load_predictor(given.predictor, open_trace(given.trace).layout)
        report = measure(batches[::step][: given.batches], forecaster, given.every, given.device, given.dtype)
    where = "one thread" if given.device == "cpu" else torch.cuda.get_device_name()
    report |= {"predictor": str(given.predictor), "model": MODEL, "torch": torch.__version__}
    report |= {"device": where, "dtype": given.dtype}
    show(report, Console(width=None if sys.stdout.isatty() else 120))
    print_json(report)


if __name__ == "__main__":
    main()
