"""Predicted gains of replicas are as close to measured ones as docs/worth-it.md says, and its tables are today's."""

from pathlib import Path

import pytest

from benchmarks import replica_rows, skew_cost

PAGE = (Path(__file__).parents[2] / "docs" / "worth-it.md").read_text()


def test_gains_of_replicas_are_within_ten_per_cent_for_four_rows_of_five_whose_loads_are_known():
    found = replica_rows.all_gains()
    known = replica_rows.summary(found["EPLB without replicas"])
    assert known["rows"] == 2 * 3 * 5 * 27  # GPUs, shapes, EP sizes, token counts
    assert known["close"] >= 0.8
    guessed = replica_rows.summary(found["experts at home"])
    assert guessed["close"] == pytest.approx(0.66, abs=0.02)


def test_the_interpolation_uses_none_of_the_rows_it_is_tested_on():
    rows = replica_rows.replica_rows("h100_sxm")
    shape = rows.filter([size == 7168 for size in rows["hidden_size"].to_pylist()])
    used = replica_rows.interpolation(shape).rows
    assert len(used.tokens) == 8 * 27  # EP sizes, token counts
    tested = shape.filter([power > 1.1 for power in shape["power"].to_pylist()])
    assert set(used.milliseconds.tolist()).isdisjoint(tested["milliseconds"].to_pylist())


def test_the_pages_tables_are_what_the_commands_print(capsys):
    skew_cost.main()
    replica_rows.main()
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith("| ") and "_sxm |" not in line and "GPU |" not in line]
    assert len(lines) > 30
    assert [line for line in lines if line not in PAGE] == []


def test_where_skew_begins_to_cost():
    assert skew_cost.begins([0.9, 1.0, 1.05, 1.2, 1.5, None, 2.0, 2.0]) == "32"
    assert skew_cost.begins([0.9, 1.0, 1.05, 1.0, 1.0, None, 1.0, 1.05]) == "never"
    assert skew_cost.by_load([(2.0, 1.0), (3.0, 1.2), (600.0, 2.0)]) == [1.1, *[None] * 6, 2.0]
