"""Makes the package's excerpt of the measured tables: the models of `shapes.py` on the GPUs of `devices.py`.

    python -m runtime.gpu.excerpt FOLDER        # .../aiconfigurator_core/systems/data of an unpacked wheel

For each GPU, model and precision it keeps the rows of the site that `even_site` chooses, balanced and of exponent 1.2;
and the rows that were measured with and without replicas. It takes a minute.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.cli import user_errors
from data.files import whole_file
from runtime.gpu.devices import GPUS, GpuDevice
from runtime.gpu.replica_rows import LARGEST, read_replica_rows
from runtime.gpu.shapes import MODELS
from runtime.gpu.sites import Site, all_sites, even_site
from runtime.gpu.skew import POWER
from runtime.gpu.tables import MEASURED, dispatch_rows, link_rows

WITH_REPLICAS = ("h100_sxm", "h200_sxm")
"""GPUs whose rows with and without replicas are kept, and those of DeepEP."""
KEPT = ("bfloat16", "fp8_block", "w4a16_mxfp4")
SKEWED_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Token counts of the skewed rows that are kept: they only check."""


def chosen_sites(device: GpuDevice, folder: Path) -> list[Site]:
    """The sites of a GPU that the excerpt holds, each once."""
    measured = {(site.shape.hidden_size, site.shape.intermediate_size, site.shape.top_k, site.shape.precision)
                for site in all_sites(device, folder)}  # fmt: skip
    found: dict[tuple[str, str, object], Site] = {}
    for shape in MODELS.values():
        for precision in KEPT:
            if (shape.hidden_size, shape.intermediate_size, shape.top_k, precision) in measured:
                site = even_site(device, type(shape)(**(vars(shape) | {"precision": precision})), folder)
                found[site.source, site.kernel, site.shape] = site
    return list(found.values())


def kept_rows(site: Site) -> pa.Table:
    """The rows of a site that the excerpt holds."""
    rows = site.rows
    skewed = pc.and_(pc.equal(rows["distribution"], f"power_law_{POWER}"),
                     pc.is_in(rows["tokens"], value_set=pa.array(SKEWED_TOKENS, rows["tokens"].type)))  # fmt: skip
    return rows.filter(pc.or_(pc.equal(rows["distribution"], "balanced"), skewed))


def make_excerpt(folder: Path, out: Path = MEASURED) -> None:
    """Writes kernels.parquet, links.parquet, dispatch.parquet and replicas.parquet."""
    if not (folder / "h100_sxm" / "moe").is_dir():
        raise ValueError(f"{folder} holds no tables; expected aiconfigurator_core/systems/data of an unpacked wheel")
    kernels = pa.concat_tables(
        kept_rows(site) for device in GPUS.values() for site in chosen_sites(device, folder)
    ).combine_chunks()
    order = [(name, "ascending") for name in kernels.column_names if name != "milliseconds"]
    _write(kernels.sort_by(order), out / "kernels.parquet")
    _write(pa.concat_tables(link_rows(name, folder) for name in GPUS), out / "links.parquet")
    _write(pa.concat_tables(dispatch_rows(name, folder) for name in WITH_REPLICAS), out / "dispatch.parquet")
    replicas = pa.concat_tables(read_replica_rows(name, folder) for name in WITH_REPLICAS)
    tested = pc.and_(pc.greater(replicas["power"], 1.1), pc.less_equal(replicas["ep_size"], LARGEST))
    used = pc.and_(pc.equal(replicas["slots"], 256), replicas["eplb"])
    _write(replicas.filter(pc.or_(tested, pc.and_(used, pc.less(replicas["power"], 1.1)))), out / "replicas.parquet")


def _write(rows: pa.Table, path: Path) -> None:
    floats = [field.name for field in rows.schema if pa.types.is_floating(field.type)]
    other = [name for name in rows.column_names if name not in floats]
    with whole_file(path) as aside:
        pq.write_table(rows, aside, compression="zstd", compression_level=19, use_dictionary=other,
                       column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"), write_statistics=False)  # fmt: skip
    print(f"{path.name}: {len(rows)} rows, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    """Command line of `make_excerpt`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    with user_errors():
        make_excerpt(parser.parse_args().folder)


if __name__ == "__main__":
    main()
