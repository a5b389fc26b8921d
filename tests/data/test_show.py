"""Statistics of a trace: change is distinguished from sampling noise, and the plots are written."""

import json
from dataclasses import replace

import numpy as np
import pytest

import data.show
from data.models.layout import MoELayout
from data.traces.statistics import measure, shuffled, step_variation
from data.traces.store import open_trace, write_about, write_counts_shard

LAYOUT = MoELayout("m", "", (("decoder", 0), ("decoder", 1)), 16, 0, 0, 0, 0)


def stored(folder, loads, layout=LAYOUT):
    write_about(
        folder, layout, [write_counts_shard(folder / "part-00000.parquet", 0, loads)], ["test"] * len(loads), "counts"
    )
    return open_trace(folder)


def test_dealing_anew_keeps_batch_sizes_and_expert_sums():
    loads = np.random.default_rng(0).integers(0, 60, (9, 2, 16))
    dealt = shuffled(loads, np.random.default_rng(1))
    assert (dealt.sum(-1) == loads.sum(-1)).all()
    assert (dealt.sum(0) == loads.sum(0)).all()
    assert (dealt >= 0).all()


def test_steady_traffic_varies_by_sampling_alone_and_changing_traffic_by_more(tmp_path):
    rng = np.random.default_rng(0)
    one, other = rng.dirichlet(np.full(16, 0.5)), rng.dirichlet(np.full(16, 0.5))
    steady = rng.multinomial(2000, one, 40)
    changing = np.stack([rng.multinomial(2000, one if step % 2 else other) for step in range(40)])
    skew = measure(stored(tmp_path, np.stack([steady, changing], 1)))
    assert skew.step_tv[0] == pytest.approx(skew.floor_tv[0], rel=0.1)
    assert skew.step_tv[1] > 5 * skew.floor_tv[1]
    assert skew.hottest[0] == pytest.approx(16 * one.max(), rel=0.05)
    assert skew.dropped is None


def test_variation_by_hand():
    loads = np.array([[[1, 1, 0, 0]], [[0, 0, 3, 3]], [[0, 3, 3, 0]], [[0, 0, 0, 0]]])
    assert step_variation(loads)[:2, 0].tolist() == [1.0, 0.5]
    assert np.isnan(step_variation(loads)[2, 0]), "a batch without load is neither like nor unlike another"


def test_a_layer_without_load_has_no_figures_and_no_panel(tmp_path, monkeypatch, capsys):
    loads = np.random.default_rng(0).integers(0, 60, (9, 2, 16))
    loads[:, 1] = 0
    stored(tmp_path, loads)
    monkeypatch.setattr("sys.argv", ["show", str(tmp_path)])
    data.show.main()
    shown = capsys.readouterr().out.splitlines()
    (row,) = [line for line in shown if "decoder_1" in line]
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["0", "-", "-", "-", "-"]
    found = json.loads(shown[-1])
    assert (found["hottest"][1], found["step_tv"][1], found["floor_tv"][1]) == (None, None, None)
    assert found["hottest"][0] > 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no load in any of its 9 batches"):
        data.show.show(stored(tmp_path / "empty", loads * 0).path)


def test_command(tmp_path, monkeypatch, capsys):
    stored(tmp_path, np.random.default_rng(0).integers(0, 60, (9, 2, 16)))
    monkeypatch.setattr("sys.argv", ["show", str(tmp_path)])
    data.show.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["shape"] == [9, 2, 16]
    assert (tmp_path / "load.png").stat().st_size > 5000
    assert (tmp_path / "drift.png").stat().st_size > 5000


def test_with_several_experts_a_token_sampling_alone_varies_less(tmp_path):
    rng = np.random.default_rng(0)
    popularity = np.log(rng.random(16))
    steps = []
    for _ in range(40):  # 4 different experts for each of 500 tokens
        chosen = np.argsort(popularity + rng.gumbel(size=(500, 16)), axis=-1)[:, -4:]
        steps.append(np.bincount(chosen.ravel(), minlength=16))
    loads, found = np.array(steps)[:, None].repeat(2, axis=1), {}
    for top_k in (1, 4):
        (folder := tmp_path / str(top_k)).mkdir()
        found[top_k] = measure(stored(folder, loads, replace(LAYOUT, experts_per_token=top_k)))
    assert found[4].step_tv[0] == pytest.approx(found[4].floor_tv[0], rel=0.1)
    assert found[1].floor_tv[0] > 1.15 * found[4].floor_tv[0]
