"""Site: one kernel on one shape of layer, with its measured rows; which site answers for a shape on a GPU.

Several engines may have measured a shape. The site whose skewed rows are predicted best is taken, by the rows of
exponent 1.01; the error that is reported is that of the rows of exponent 1.2. For a shape that nobody measured, the
nearest one lends its utilisation: an estimate.

TensorRT-LLM's rows for wide expert parallelism are preferred where they exist: see `replica_rows.py`.
"""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.arrays import FloatArray
from runtime.gpu.devices import GpuDevice
from runtime.gpu.kernel_time import FEWEST_ROWS, Error, KernelTimes, KnownRows
from runtime.gpu.replica_rows import EXPERTS, PRECISION, TOP_K, replica_rows
from runtime.gpu.shapes import EIGHT_BIT, ExpertShape
from runtime.gpu.skew import POWER, most_loaded
from runtime.gpu.tables import column, kernel_rows, version_order

KEYS = ("source", "kernel", "precision", "hidden_size", "intermediate_size", "top_k", "num_experts")
"""Columns that tell sites apart."""
CHOOSING = 1.01
"""Exponent of the skewed rows by which a site is chosen."""
FEWEST_SIZES = 3
"""Fewest EP sizes of a site."""


@dataclass(frozen=True, eq=False)
class Site:
    """A kernel on a shape.

    Attributes:
        device: The GPU.
        shape: The shape that was measured.
        source: Engine and version.
        kernel: Name of the kernel.
        rows: Its measured rows.
        asked: The shape that is answered for; another one where this is an estimate.
    """

    device: GpuDevice
    shape: ExpertShape
    source: str
    kernel: str
    rows: pa.Table
    asked: ExpertShape
    all_to_all: ClassVar[bool] = False
    """Whether the kernel is given only the tokens that chose its experts; if not, those of all GPUs."""

    @property
    def engine(self) -> str:
        """The engine, without its version."""
        return self.source.split()[0]

    def version(self) -> list[int]:
        """The engine's version, in an order."""
        return version_order(self.source)

    @property
    def estimated(self) -> bool:
        """Whether another shape was measured than is asked for."""
        return _sizes(self.shape) != _sizes(self.asked)

    @cached_property
    def times(self) -> KernelTimes:
        """Its times."""
        return KernelTimes(KnownRows.balanced(self.rows, self.shape.num_experts, self.shape.top_k))

    def skewed(self, power: float = POWER) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Tokens, predicted and measured milliseconds of the rows whose loads follow a power law.

        None of them was used before. What is predicted is the mean over draws from the law.

        Args:
            power: The law's exponent.
        """
        skewed = self.rows.filter(pc.equal(self.rows["distribution"], f"power_law_{power}"))
        tokens, sizes = column(skewed, "tokens"), column(skewed, "ep_size")
        predicted = []
        for count, size in zip(tokens.astype(int).tolist(), sizes.astype(int).tolist(), strict=True):
            loads = most_loaded(count, self.shape.num_experts, self.shape.top_k, size, power)
            times = self.times.milliseconds(np.array(count), loads.assignments, loads.active)
            predicted.append(float(times.mean()))
        return tokens, np.array(predicted), column(skewed, "milliseconds")

    @cached_property
    def skewed_error(self) -> Error:
        """Error on the skewed rows that nothing was chosen by."""
        return Error.of(*self.skewed()[1:])

    def milliseconds(self, tokens: FloatArray, assignments: FloatArray, active: FloatArray) -> FloatArray:
        """Time of a GPU, as in `KernelTimes.milliseconds`, for the shape that is asked for."""
        measured = self.times.milliseconds(tokens, assignments, active)
        if not self.estimated:
            return measured
        scale = roofline(self.asked, self.device, assignments, active) / np.maximum(
            roofline(self.shape, self.device, assignments, active), 1e-12
        )
        return measured * np.where(assignments > 0, scale, 1.0)


class WideSite(Site):
    """A kernel behind an all-to-all dispatch, on rows with skewed loads that are known: those placed by EPLB.

    Times come from the rows without replicas of exponent 1.01; those of exponent 1.2 check them.
    """

    all_to_all = True

    @cached_property
    def times(self) -> KernelTimes:
        """Its times."""
        return KernelTimes(KnownRows(*self._loads(powers=(0.0, POWER - 0.1), slots=self.shape.num_experts)))

    def skewed(self, power: float = POWER) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Tokens, predicted and measured milliseconds of the rows of one exponent, with replicas and without."""
        tokens, _, assignments, active, measured = self._loads(powers=(power - 0.05, power + 0.05))
        return tokens, self.times.milliseconds(tokens, assignments, active), measured

    def _loads(self, powers: tuple[float, float], slots: int | None = None) -> list[FloatArray]:
        """Tokens, EP size, assignments, active experts and milliseconds of the rows that EPLB placed."""
        kept = pc.and_(self.rows["eplb"], pc.and_(pc.greater(self.rows["power"], powers[0]),
                                                  pc.less(self.rows["power"], powers[1])))  # fmt: skip
        rows = self.rows.filter(kept if slots is None else pc.and_(kept, pc.equal(self.rows["slots"], slots)))
        return [column(rows, name) for name in ("tokens", "ep_size", "assignments", "active", "milliseconds")]


def roofline(shape: ExpertShape, device: GpuDevice, assignments: FloatArray, active: FloatArray) -> FloatArray:
    """Milliseconds that reading the weights or multiplying takes at the nominal speeds, whichever takes longer."""
    fast = 2 if shape.precision in EIGHT_BIT else 1
    reading = active * shape.expert_bytes / device.memory_speed
    return 1e3 * np.maximum(reading, assignments * shape.operations / (fast * device.operations))


def find_site(device: GpuDevice, shape: ExpertShape, folder: Path | None = None) -> Site:
    """The site that answers for a shape: a wide one if there is one, because its loads are known, or `even_site`."""
    rows = replica_rows(device.name)
    sizes = zip(rows["hidden_size"].to_pylist(), rows["intermediate_size"].to_pylist(), strict=True)
    asked = shape.hidden_size, shape.intermediate_size
    if (shape.precision, shape.top_k) != (PRECISION, TOP_K) or asked not in sizes or shape.matrices != 3:
        return even_site(device, shape, folder)
    rows = rows.filter(pc.equal(rows["hidden_size"], shape.hidden_size))
    measured = replace(shape, name="measured", num_experts=EXPERTS, layers=None)
    return WideSite(device, measured, str(rows["source"][0]), "wide expert parallelism, cutlass", rows, shape)


def even_site(device: GpuDevice, shape: ExpertShape, folder: Path | None = None) -> Site:
    """The site that answers for a shape, among those with balanced rows.

    Args:
        device: The GPU.
        shape: Sizes of the layer; its number of experts need not have been measured.
        folder: Folder of the whole tables; None for the excerpt.

    Raises:
        ValueError: If nothing was measured in this precision.
    """
    sites = all_sites(device, folder)
    same = [site for site in sites if _sizes(site.shape) == _sizes(shape)]
    fitting = [site for site in same if site.shape.precision == shape.precision]
    if same and not fitting:
        known = sorted({site.shape.precision for site in same})
        raise ValueError(
            f"precision: {shape.name} was not measured in {shape.precision} on {device.name}; choose from "
            f"{', '.join(known)}"
        )
    if fitting:
        return replace(_best(_as_many_experts(fitting, shape.num_experts)), asked=shape)
    return replace(_nearest(sites, shape, device), asked=shape)


def _as_many_experts(sites: list[Site], wanted: int) -> list[Site]:
    """Those with the fewest experts that are enough, or the most: h depends on a GPU's experts, not on the layer's."""
    counts = sorted({site.shape.num_experts for site in sites})
    count = next((count for count in counts if count >= wanted), counts[-1])
    return [site for site in sites if site.shape.num_experts == count]


def _best(sites: list[Site]) -> Site:
    if len(sites) == 1:
        return sites[0]
    return min(sites, key=lambda site: np.nan_to_num(Error.of(*site.skewed(CHOOSING)[1:]).median, nan=np.inf))


def _nearest(sites: list[Site], shape: ExpertShape, device: GpuDevice) -> Site:
    """The measured shape whose expert and width are nearest, in ratio."""
    alike = [site for site in sites if site.shape.precision == shape.precision]
    if not alike:
        known = sorted({site.shape.precision for site in sites})
        raise ValueError(f"precision: {shape.precision} was not measured on {device.name}; choose from {known}")
    near = min(alike, key=lambda site: _distance(site.shape, shape))
    return _best([site for site in alike if site.shape == near.shape])


def estimate_error(device: GpuDevice, shape: ExpertShape, folder: Path | None = None) -> Error:
    """How far estimates are off: each measured shape of this precision, estimated from the nearest other one."""
    sites = [site for site in all_sites(device, folder) if site.shape.precision == shape.precision]
    predicted, measured = [], []
    for site in sites:
        others = [other for other in sites if _sizes(other.shape) != _sizes(site.shape)]
        if not others:
            continue
        lender = replace(min(others, key=lambda other: _distance(other.shape, site.shape)), asked=site.shape)
        rows = site.times.rows
        predicted.append(lender.milliseconds(rows.tokens, rows.assignments, rows.active))
        measured.append(rows.milliseconds)
    if not measured:
        return Error(float("nan"), float("nan"), 0)
    return Error.of(np.concatenate(predicted), np.concatenate(measured))


def _sizes(shape: ExpertShape) -> tuple[int, int, int, int]:
    return shape.hidden_size, shape.intermediate_size, shape.top_k, shape.matrices


def _distance(one: ExpertShape, other: ExpertShape) -> float:
    return float(
        abs(np.log(one.expert_bytes / other.expert_bytes)) + 0.5 * abs(np.log(one.hidden_size / other.hidden_size))
        + 0.1 * abs(np.log(one.top_k / other.top_k))
    )  # fmt: skip


@cache
def all_sites(device: GpuDevice, folder: Path | None = None) -> list[Site]:
    """Every site of a GPU that has enough EP sizes, as the newest version of its engine measured it."""
    rows = kernel_rows(device.name, folder)
    numbered = rows.append_column("row", pa.array(np.arange(len(rows))))
    found = []
    for group in numbered.group_by(list(KEYS)).aggregate([("row", "list")]).to_pylist():
        chosen = rows.take(group["row_list"])
        even = chosen.filter(pc.equal(chosen["distribution"], "balanced"))
        sizes, counts = np.unique(column(even, "ep_size"), return_counts=True)
        if len(sizes) >= FEWEST_SIZES and (counts >= FEWEST_ROWS).any():
            sizes_of = {name: int(group[name]) for name in KEYS[3:]}
            shape = ExpertShape("measured", precision=group["precision"], **sizes_of)
            found.append(Site(device, shape, group["source"], group["kernel"], chosen, shape))
    newest = {(site.engine, site.shape): site.source for site in sorted(found, key=Site.version)}
    kept = [site for site in found if newest[site.engine, site.shape] == site.source]
    return sorted(kept, key=lambda site: (site.source, site.kernel, str(site.shape)))
