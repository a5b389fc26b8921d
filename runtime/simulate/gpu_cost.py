"""GpuTimes: what recorded loads cost on a GPU that is not here, from the measured tables of `runtime.gpu`.

    from runtime.simulate import compare_policies, gpu_times

    times = gpu_times("h100_sxm", loads, like="gpt_oss_20b")
    report = compare_policies(loads, 8, 16, hardware=times, tokens_per_step=8192)

A layer takes as long as its slowest GPU computes, and the exchange of tokens before and after. An all-gather exchange
is the same for every placement; an all-to-all one takes as long as its most loaded GPU. Moves and forecasts overlap
with the step before. Attention, norms and the head are left out.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.arrays import FloatArray, IntArray
from data.models.layout import SWITCH
from data.traces.load_stream import LoadStream, Recorded, as_stream
from runtime.gpu.devices import gpu_device
from runtime.gpu.kernel_time import Error
from runtime.gpu.links import Links
from runtime.gpu.shapes import MODELS, ExpertShape, known_shape
from runtime.gpu.sites import Site, estimate_error, find_site
from runtime.gpu.tables import package_folder
from runtime.simulate.cost_model import DeviceTimes
from runtime.simulate.outcome import Outcome


def gpu_times(
    gpu: str,
    recorded: Recorded,
    like: str | None = None,
    precision: str | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    top_k: int | None = None,
) -> "GpuTimes":
    """Times on a GPU, for layers of a known model or of given sizes.

    Args:
        gpu: A name in `runtime.gpu.devices.GPUS`.
        recorded: The loads, or the path of a recording; a trace names the sizes of its model.
        like: A name in `runtime.gpu.shapes.MODELS`, whose sizes are taken.
        precision: Of the weights; by default the model's usual one.
        hidden_size: Width of the hidden states.
        intermediate_size: Inner width of an expert.
        top_k: Experts of a token.

    Raises:
        ValueError: If a name is unknown, sizes are missing, or nothing was measured in that precision.
    """
    device = gpu_device(gpu)
    stream = as_stream(recorded)
    experts, layout = stream.num_experts, stream.layout
    given = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "top_k": top_k}
    sizes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if like is not None:
        shape = known_shape(like)
    elif layout is not None and layout.d_model and layout.d_ff:
        matrices = 2 if layout.family == SWITCH else 3
        shape = ExpertShape(layout.model_id, layout.d_model, layout.d_ff, layout.experts_per_token, experts,
                            layers=len(layout.layers), matrices=matrices)  # fmt: skip
    elif len(sizes) == len(given):
        shape = ExpertShape("custom", num_experts=experts, **sizes)
    else:
        missing = ", ".join(f"--{name.replace('_', '-')}" for name in given if name not in sizes)
        raise ValueError(
            f"the recording does not name its model: give --like, one of {', '.join(MODELS)}; or {missing}"
        )
    of_model = shape.num_experts
    shape = replace(shape, num_experts=experts, precision=precision or shape.precision, **sizes)
    if experts != of_model:
        shape = replace(shape, layers=None)  # another model, of which the sizes of an expert alone are borrowed
    folder = package_folder()
    return GpuTimes(find_site(device, shape, folder), folder, of_model)


class GpuTimes(DeviceTimes):
    """Times of a site's kernel, of NCCL, and of moves.

    Args:
        site: The kernel, its shape and its measured rows.
        folder: Folder of the whole tables; None where the excerpt was read.
        of_model: Experts of the model whose sizes were taken; None where it has as many as the loads.
    """

    def __init__(self, site: Site, folder: Path | None = None, of_model: int | None = None) -> None:
        self.site, self.folder, self.of_model = site, folder, of_model
        self.expert_bytes, self.top_k, self.layers = site.asked.expert_bytes, site.asked.top_k, site.asked.layers
        self.memory_bytes = site.device.memory_bytes
        self.errors = self._errors()
        self.error = max(error.median for error in self.errors.values() if error.rows)

    @property
    def move_tokens(self) -> float:
        many = np.array([4096.0, 8192.0])
        one, two = self.site.milliseconds(np.zeros(2), many, np.full(2, 8.0))
        return float(self._links(2).move_milliseconds(np.array(self.expert_bytes)) / max((two - one) / 4096, 1e-12))

    def check(self, stream: LoadStream, devices: int, slots: int) -> None:
        times, name = self.site.times, f"{self.site.source} on {self.site.device.name}"
        most, mean = (count / self.site.asked.top_k for count in (stream.most_tokens, stream.mean_tokens))
        if most > 1.001 * times.most_tokens:  # counts that were scaled are rounded
            raise ValueError(
                f"outside of the measured table: a step has up to {most:,.0f} tokens, {name} was measured up to "
                f"{times.most_tokens:,.0f}; give --tokens-per-step of at most {times.most_tokens * mean / most:.0f}"
            )
        if devices > times.most_devices:
            raise ValueError(
                f"outside of the measured table: {devices} devices, {name} was measured on up to {times.most_devices}"
            )
        if slots > times.most_experts:
            raise ValueError(
                f"outside of the measured table: {slots} experts on a device, {name} was measured with up to "
                f"{times.most_experts}; give more --devices"
            )

    def layer_seconds(self, device_load: IntArray, active: IntArray) -> FloatArray:
        top_k = self.site.asked.top_k
        tokens = device_load.sum(-1) / top_k
        load, awake = (np.asarray(counts, np.float64) for counts in (device_load, active))
        kernel = self.site.milliseconds(tokens[..., None], load, awake)
        links, width = self._links(load.shape[-1]), self.site.asked.hidden_size
        if self.site.all_to_all:
            exchange = links.dispatch_milliseconds(load.max(-1) / top_k, width, top_k)
        else:
            exchange = links.exchange_milliseconds(tokens, width)
        return np.asarray(1e-3 * (kernel.max(-1) + exchange))

    def move_seconds(self, arrivals: IntArray, far_arrivals: IntArray) -> FloatArray:
        links = self._links(arrivals.shape[-1])
        return 1e-3 * links.move_milliseconds(arrivals.max(-1) * self.expert_bytes)

    def split_seconds(self, outcome: Outcome, quantile: float) -> float:
        """An even split is part of routing; quotas are computed on the host, from the counts of every layer."""
        return 0.0 if outcome.split == "even" else super().split_seconds(outcome, quantile)

    def _errors(self) -> dict[str, Error]:
        """Errors on rows that were left out, by what they differ in from the rows that were used."""
        times = self.site.times
        found = {"tokens": times.token_error(), "ep_size": times.ep_error(), "skew": self.site.skewed_error}
        if self.site.estimated:
            found["shape"] = estimate_error(self.site.device, self.site.asked, self.folder)
        return found

    def described(self, devices: int) -> dict[str, Any]:
        shape, site, links = self.site.asked, self.site, self._links(devices)
        dispatched = f"{links.dispatch_source}, moves by " if site.all_to_all else ""
        measured = f"{site.shape.hidden_size} x {site.shape.intermediate_size}, top {site.shape.top_k}"
        return {
            "gpu": site.device.name,
            "kernel": f"{site.source}, {site.kernel}",
            "tables": "whole" if self.folder else "excerpt",
            "estimate": f"from the utilisation of {measured}" if site.estimated else None,
            "model": shape.name,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "top_k": shape.top_k,
            "num_experts": shape.num_experts,
            "model_experts": self.of_model or shape.num_experts,
            "precision": shape.precision,
            "expert_bytes": round(shape.expert_bytes),
            "dispatch": "all-to-all" if site.all_to_all else "all-gather",
            "links": (dispatched + links.source) if links.measured else "between nodes: nominal speed",
            "error": {
                name: {"median": round(error.median, 4), "p90": round(error.p90, 4), "rows": error.rows}
                for name, error in self.errors.items()
                if error.rows
            },
        }

    def _links(self, devices: int) -> Links:
        return Links(self.site.device, devices, self.folder)
