"""Logs a router trace: a Switch model reads a stream of batches, its routers are tapped, what they did is stored.

Run it with `python -m data.collect --out outputs/traces/switch-mini-64`; with no --text it reads the offline corpus.
"""

import json
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from data.cli import user_errors
from data.files import read_json, sha256, write_json
from data.layout import MoELayout
from data.store import FORMAT_VERSION, TRACE_JSON, StoredTrace, open_trace, write_shard
from data.switch import BUNDLED, LoadedSwitch, load_switch
from data.tap import RouterTap
from data.text import offline_corpus, read_text
from data.trace import PADDING, RouterTrace, TokenBatch, pad_tokens
from data.traffic import PHASES, Traffic, TrafficBatch, corpus_traffic, text_traffic

SHARD_BATCHES = 32
Decode = Literal["teacher", "none"]


def open_traffic(text: str | None, tokenizer: Any, decode: Decode, traffic: Traffic) -> Iterator[TrafficBatch]:
    """The stream of batches: the user's text, or the offline corpus where there is none."""
    if text is None:
        return corpus_traffic(offline_corpus("traffic"), tokenizer, decode == "teacher", traffic)
    return text_traffic(read_text(text), tokenizer, decode == "teacher", traffic)


def shift_right(targets: TokenBatch, start: int) -> TokenBatch:
    """Decoder inputs of teacher forcing: the targets moved one place to the right behind the start token."""
    first = torch.full_like(targets.input_ids[:, :1], start)
    return TokenBatch(torch.cat([first, targets.input_ids[:, :-1]], 1), targets.mask)


def model_inputs(batch: TrafficBatch, switch: LoadedSwitch) -> tuple[TokenBatch, TokenBatch]:
    """Encoder and decoder tokens of a batch, `[B, T]` and `[B, U]`."""
    pad = switch.model.config.pad_token_id
    targets = pad_tokens(batch.targets, pad)
    decoder = shift_right(targets, switch.model.config.decoder_start_token_id or pad) if targets.mask.any() else targets
    return pad_tokens(batch.sources, pad), decoder


@torch.inference_mode()
def trace_batch(batch: TrafficBatch, switch: LoadedSwitch, tap: RouterTap) -> RouterTrace:
    """Runs one batch through the tapped model."""
    tokens, decoder = model_inputs(batch, switch)
    device = switch.model.device
    attention = tokens.mask.long().to(device)
    hidden = switch.model.encoder(input_ids=tokens.input_ids.to(device), attention_mask=attention)[0]
    if decoder.mask.any():
        switch.model.decoder(
            input_ids=decoder.input_ids.to(device), encoder_hidden_states=hidden, encoder_attention_mask=attention
        )
    calls, split = tap.take(), switch.layout.num_encoder_layers
    none = [(torch.zeros(decoder.input_ids.shape, dtype=torch.int16), torch.zeros(()))]
    encoder_experts = _experts(calls[:split], tokens.mask)
    decoder_experts = _experts([call or none for call in calls[split:]], decoder.mask)
    return RouterTrace(
        batch.number, batch.phase, batch.split, batch.segments, tokens, decoder, encoder_experts, decoder_experts
    )


def _experts(calls: list[list[tuple[Tensor, Tensor]]], mask: Tensor) -> Tensor:
    """Expert of each token, padding marked, `[L, B, T]`."""
    experts = [torch.cat([call[0] for call in layer], 1).cpu().masked_fill(~mask, PADDING) for layer in calls]
    return torch.stack(experts) if experts else torch.zeros((0, *mask.shape), dtype=torch.int16)


def _prepare(out: Path, request: dict[str, Any]) -> tuple[Path, list[dict[str, Any]]]:
    """The folder to write into and the whole shards an interrupted run of the same request left there."""
    partial = out.with_name(out.name + ".partial")
    started = partial / "request.json"
    if started.exists() and read_json(started) == request:
        shards: list[dict[str, Any]] = []
        while (about := partial / f"shard-{len(shards):05d}.json").exists():
            shard = read_json(about)
            if sha256(partial / shard["file"]) != shard["sha256"]:
                break
            shards.append(shard)
        return partial, shards
    shutil.rmtree(partial, ignore_errors=True)
    write_json(started, request)
    return partial, []


def _write_shards(
    partial: Path, done: list[dict[str, Any]], batches: Iterator[TrafficBatch], switch: LoadedSwitch, total: int | None
) -> list[dict[str, Any]]:
    """Traces what is left of the stream shard by shard; returns the description of all shards."""
    shards: list[dict[str, Any]] = list(done)
    skip = sum(shard["batches"] for shard in done)
    with RouterTap(switch.model, switch.layout) as tap, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("tracing", total=total, completed=skip)
        rest = islice(batches, skip, None)
        while chunk := list(islice(rest, SHARD_BATCHES)):
            traces = []
            for batch in chunk:
                traces.append(trace_batch(batch, switch, tap))
                progress.advance(task)
            file = f"part-{len(shards):05d}.parquet"
            write_shard(partial / file, traces, switch.layout)
            shard = {"file": file, "batches": len(traces), "sequences": sum(len(trace.segments) for trace in traces)}
            shard |= {"tokens": sum(trace.tokens.num_tokens for trace in traces), "sha256": sha256(partial / file)}
            write_json(partial / f"shard-{len(shards):05d}.json", shard)
            shards.append(shard)
    return shards


def _request(layout: MoELayout, text: str | None, decode: Decode, traffic: Traffic) -> dict[str, Any]:
    """Everything the bytes of a trace depend on."""
    libraries = {name: version(name) for name in ("torch", "transformers", "numpy", "pyarrow")}
    return {
        "format_version": FORMAT_VERSION,
        "layout": layout.to_json(),
        "text": text or "offline corpus",
        "decode": decode,
        "traffic": asdict(traffic),
        "dtype": "float32",
        "versions": libraries | {"python": platform.python_version()},
    }


def collect(
    model: str = BUNDLED,
    out: Path = Path("outputs/traces/switch-mini-64"),
    text: str | None = None,
    decode: Decode = "teacher",
    traffic: Traffic = Traffic(),
    revision: str = "",
) -> StoredTrace:
    """Logs the router trace of a Switch model over a stream of text.

    A trace of the same request that is already there is reused; an interrupted one resumes at its last whole shard.

    Args:
        model: 'switch-mini-64' (bundled), a local folder, or a hub id such as google/switch-base-8.
        out: Folder of the trace; it appears whole or not at all.
        text: File, folder or hub data set `owner/name[:config[:split]]`; the offline corpus by default.
        decode: "teacher" masks spans of the text and feeds the decoder the truth, "none" runs the encoder alone.
        traffic: How the stream is cut into batches.
        revision: Revision of a hub model.

    Raises:
        ValueError: On a model, text or folder that cannot be used; the message says what to do.
    """
    switch = load_switch(model, revision)
    request = _request(switch.layout, text, decode, traffic)
    console = Console(stderr=True)
    if out.exists():
        found = open_trace(out)
        if {key: found.about.get(key) for key in request} != request:
            differing = [key for key in request if found.about.get(key) != request[key]]
            raise ValueError(
                f"{out} holds another trace ({', '.join(differing)} differ); name another --out or remove it"
            )
        console.print(f"Reusing the trace in {out} ({found.num_batches} batches)")
        return found
    partial, done = _prepare(out, request)
    if done:
        console.print(f"Resuming the interrupted trace after {len(done)} shards")
    total = len(PHASES) * traffic.batches + max(traffic.batches // 3, 1) if text is None else None
    shards = _write_shards(partial, done, open_traffic(text, switch.tokenizer, decode, traffic), switch, total)
    write_json(partial / TRACE_JSON, request | {"shards": shards})
    for leftover in [partial / "request.json", *partial.glob("shard-*.json")]:
        leftover.unlink()
    partial.rename(out)
    return open_trace(out)


def main() -> None:
    """Command line of `collect`; the last line of stdout is one JSON document."""
    from jsonargparse import auto_cli

    with user_errors():
        trace: StoredTrace = auto_cli(collect)
        sums = {key: sum(shard[key] for shard in trace.about["shards"]) for key in ("batches", "sequences", "tokens")}
        print(json.dumps({"trace": str(trace.path), **sums, "fingerprint": trace.layout.fingerprint()}))


if __name__ == "__main__":
    main()
