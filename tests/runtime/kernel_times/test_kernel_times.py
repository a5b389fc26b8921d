"""Times on GPUs that are not here: measured rows, what is interpolated between them, and how far off that is."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from runtime.gpu.devices import GPUS, gpu_device
from runtime.gpu.kernel_time import KernelTimes, KnownRows
from runtime.gpu.links import Links
from runtime.gpu.shapes import MODELS, ExpertShape, known_shape
from runtime.gpu.sites import all_sites, estimate_error, find_site
from runtime.gpu.skew import most_loaded
from runtime.gpu.tables import MEASURED, kernel_rows

H100 = gpu_device("h100_sxm")


def site(model, gpu="h100_sxm"):
    return find_site(gpu_device(gpu), known_shape(model))


def even(site, tokens, devices):
    """Milliseconds where every expert has as many tokens as every other."""
    rank = tokens * site.shape.top_k / devices
    return float(
        site.milliseconds(np.array(tokens), np.array(rank), np.array(min(site.shape.num_experts / devices, rank)))
    )


@pytest.mark.parametrize(
    ("model", "tokens", "devices", "milliseconds"),
    [
        ("qwen3_30b", 16, 1, 0.420), ("qwen3_30b", 16, 8, 0.0911), ("qwen3_30b", 4096, 8, 0.328),
        ("gpt_oss_20b", 4096, 8, 0.743), ("glm_5", 4096, 8, 1.5445), ("glm_5", 16384, 32, 2.961),
    ],
)  # fmt: skip
def test_measured_rows_are_returned_as_measured(model, tokens, devices, milliseconds):
    found = site(model)
    assert even(found, tokens, devices) == pytest.approx(milliseconds, rel=0.002)
    rows = found.rows.to_pylist()
    row = next(
        row for row in rows if (row["tokens"], row["ep_size"], row["distribution"]) == (tokens, devices, "balanced")
    )
    assert even(found, tokens, devices) == pytest.approx(row["milliseconds"], rel=1e-3)


def test_rows_with_replicas_are_measured_on_loads_that_are_known():
    """Wide expert parallelism: EPLB has evened the loads out, so that a row's own time is that of its mean load."""
    found = site("deepseek_v3")
    assert found.all_to_all
    assert not site("gpt_oss_20b").all_to_all
    assert even(found, 4096, 8) == pytest.approx(1.014, rel=0.05)
    assert even(found, 16384, 8) == pytest.approx(3.062, rel=0.05)
    assert site("kimi_k2").rows.equals(found.rows)  # as wide, with more experts, of which a GPU has some


def test_an_all_to_all_dispatch_takes_as_long_as_its_most_loaded_gpu():
    links = Links(H100, 8)
    took = links.dispatch_milliseconds(np.array([1024.0, 8192.0]), 7168, 8)
    assert took == pytest.approx([0.158 + 0.307, 0.968 + 1.845], rel=0.02)  # DeepEP, dispatch and combine
    assert "DeepEP" in links.dispatch_source
    assert Links(H100, 1).dispatch_milliseconds(np.array([8.0]), 7168, 8)[0] == 0
    assert Links(H100, 64).dispatch_milliseconds(np.array([8192.0]), 7168, 8)[0] > 10


def test_between_measured_rows_times_lie_between_theirs():
    found = site("qwen3_30b")
    assert even(found, 256, 8) < even(found, 300, 8) < even(found, 320, 8)
    assert even(found, 4096, 8) < even(found, 4096, 6) < even(found, 4096, 4)


def test_a_known_law_is_recovered():
    """overhead x tokens + price x active experts + rate x assignments: all three are told apart."""
    rows = [(tokens, size) for size in (1, 2, 4, 8, 16) for tokens in 2.0 ** np.arange(4, 15)]
    tokens, size = np.array(rows).T

    def law(tokens, rank, active):
        return 1e-4 * tokens + 0.01 * active + 5e-5 * rank + 0.02

    rank = tokens * 4 / size
    active = np.minimum(64 / size, rank)
    times = KernelTimes(KnownRows(tokens, size, rank, active, law(tokens, rank, active)))
    assert times.overhead == pytest.approx(1e-4, rel=0.02)
    asked = np.array([(8192, 16384, 9), (16384, 60000, 8), (4096, 1500, 5)], float).T
    assert times.milliseconds(*asked) == pytest.approx(law(*asked), rel=0.02)
    assert times.milliseconds(np.array(64.0), np.array(0.0), np.array(0.0)) == pytest.approx(times.overhead * 64)


@pytest.mark.parametrize(
    ("model", "tokens", "ep_size", "skew"),
    [("qwen3_30b", 0.011, 0.023, 0.052), ("qwen3_235b", 0.010, 0.026, 0.056), ("gpt_oss_20b", 0.019, 0.045, 0.053),
     ("deepseek_v3", 0.037, 0.033, 0.033)],
)  # fmt: skip
def test_rows_left_out_are_predicted_to_a_few_per_cent(model, tokens, ep_size, skew):
    """The errors that stand beside a verdict on H100, medians."""
    found = site(model)
    assert found.times.token_error().median == pytest.approx(tokens, abs=0.002)
    assert found.times.ep_error().median == pytest.approx(ep_size, abs=0.002)
    assert found.skewed_error.median == pytest.approx(skew, abs=0.003)


def test_skewed_loads_have_every_token_and_a_hot_rank():
    loads = most_loaded(4096, 128, 8, 8)
    assert (loads.assignments > 4096 * 8 / 8).all()
    assert (loads.assignments <= 4096 * 8).all()
    assert (loads.active <= 16).all()
    assert loads.assignments.mean() / 4096 == pytest.approx(2.0, abs=0.15)
    assert most_loaded(3, 128, 8, 8).assignments.min() >= 3


def test_skew_costs_nothing_where_experts_have_few_tokens():
    """Reading weights decides there; with hundreds of tokens an expert, the most loaded GPU's products decide."""
    found = site("qwen3_235b")

    def cost(tokens):
        loads = most_loaded(tokens, 128, 8, 8)
        return found.milliseconds(np.array(tokens), loads.assignments, loads.active).mean() / even(found, tokens, 8)

    assert cost(128) < 1.05  # 8 tokens an expert
    assert 1.2 < cost(4096) < cost(16384)


def test_every_known_model_has_an_answer_on_every_gpu():
    for device in GPUS.values():
        for shape in MODELS.values():
            precisions = sorted({one.shape.precision for one in all_sites(device)})
            answers = [precision for precision in precisions if _answers(device, shape, precision)]
            assert answers, (device.name, shape.name)


def _answers(device, shape, precision):
    try:
        return find_site(device, ExpertShape(**(vars(shape) | {"precision": precision}))).times.overhead >= 0
    except ValueError:
        return False


def test_a_shape_that_nobody_measured_is_an_estimate_from_the_nearest():
    found = site("switch_base_128")
    assert found.estimated
    assert (found.shape.hidden_size, found.shape.intermediate_size) == (2048, 768)
    assert not site("qwen3_30b").estimated
    # as many weights as the shape that lends its utilisation: 2 x 768 x 3072 = 3 x 2048 x 768
    lent = site("qwen3_30b")
    load = np.array(2000.0), np.array(4000.0), np.array(16.0)
    assert found.milliseconds(*load) == pytest.approx(lent.milliseconds(*load))
    error = estimate_error(H100, found.asked)
    assert 0.1 < error.median < 0.4
    assert error.rows > 500


def test_a_precision_that_nobody_measured_is_refused():
    with pytest.raises(ValueError, match="deepseek_v3 was not measured in fp8_block on a100_sxm; choose from bfloat16"):
        site("deepseek_v3", "a100_sxm")
    with pytest.raises(ValueError, match="precision: unknown 'fp7'; choose from bfloat16"):
        ExpertShape("custom", 1, 1, 1, 1, "fp7")
    with pytest.raises(ValueError, match="hidden_size is 0, expected 1 or more"):
        ExpertShape("custom", 0, 1, 1, 1)


def test_moves_and_dispatch_take_what_nccl_took():
    links = Links(H100, 8)
    assert links.exchange_milliseconds(np.array([4096.0]), 4096)[0] == pytest.approx(
        0.1255 + 0.1113, rel=0.01
    )  # 32 MiB
    seconds = 1e-3 * links.move_milliseconds(np.array([1e9, 2e9]))
    assert 1e9 / seconds[0] == pytest.approx(330e9, rel=0.1)
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=0.01)
    assert links.move_milliseconds(np.zeros(3)).tolist() == [0, 0, 0]
    assert not Links(H100, 16).measured
    assert Links(H100, 16).move_milliseconds(np.array([50e9]))[0] == 1000
    assert Links(H100, 1).exchange_milliseconds(np.array([8.0]), 64)[0] == 0


def test_the_excerpt_is_small_and_carries_its_notice():
    assert sum(path.stat().st_size for path in MEASURED.iterdir()) < 150_000
    assert "Apache License" in (MEASURED / "NOTICE").read_text()
    assert set(kernel_rows("h100_sxm")["gpu"].to_pylist()) == {"h100_sxm"}


def test_whole_tables_are_read_from_their_own_files(tmp_path):
    """A folder laid out like that of aiconfigurator-core, with the rows of one kernel in two versions."""
    rows = site("gpt_oss_20b").rows
    names = {"kernel": "kernel_source", "precision": "moe_dtype", "intermediate_size": "inter_size", "top_k": "topk",
             "ep_size": "moe_ep_size", "tokens": "num_tokens", "milliseconds": "latency"}  # fmt: skip
    old = rows.drop_columns(["gpu", "source"]).rename_columns([names.get(name, name) for name in rows.column_names[2:]])
    old = old.append_column("moe_tp_size", pa.array([1] * len(old)))
    for version, factor in (("0.9.0", 3.0), ("0.24.0", 2.0)):
        folder = tmp_path / "h100_sxm" / "moe" / "vllm" / version
        folder.mkdir(parents=True)
        times = pa.array(factor * old["latency"].to_numpy())
        pa.parquet.write_table(
            old.set_column(old.column_names.index("latency"), "latency", times), folder / "moe_perf.parquet"
        )
    found = find_site(H100, known_shape("gpt_oss_20b"), tmp_path)
    assert found.source == "vllm 0.24.0"  # the newer version
    assert even(found, 4096, 8) == pytest.approx(2 * even(site("gpt_oss_20b"), 4096, 8), rel=1e-5)
