"""Folders of results: figures of README and docs come from them, and folders can be compared."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import benchmarks.bench
import benchmarks.bench_long
import benchmarks.bench_settings
import benchmarks.report
from benchmarks.published import BLOCK, PAGES, generated, written_by
from benchmarks.support.printed import printed
from benchmarks.support.results import BENCH, GPU, LONG, SETTINGS, Results, figures
from benchmarks.support.steps import Step, as_typed, results_folder, run_again, run_all
from tests.test_docs import parse  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", PAGES)
def test_figures_of_a_page_are_those_of_the_folder_that_it_names(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text()
    assert BLOCK.findall(text), f"{page} shows no figures"
    assert generated(text) == text, "python -m benchmarks.published FOLDER writes the figures anew"


MEASURED = re.compile(r"(?<![\w.])\.\d{2,}|\d ?%|\de-\d|\b\d+:\d\d\b|\d (?:ms|s|seconds|minutes|hours|MB|GB|GiB)\b")
"""Figures as a page writes them: .964, 23 %, 1.4e-06, 3:22, 7 s."""
OTHERS = ("trades 5-10 % of quality", "gives up 5-10 % of quality")
"""What others state of themselves."""


def by_hand(text: str) -> list[str]:
    """Figures of a page outside of its generated blocks, code and links."""
    for noise in (BLOCK, re.compile(r"```.*?```", re.DOTALL), re.compile(r"`[^`]*`"), re.compile(r"\]\([^)]*\)")):
        text = noise.sub(" ", text)
    for stated in OTHERS:
        text = text.replace(stated, " ")
    return MEASURED.findall(text)


def test_no_figure_of_readme_is_written_by_hand():
    assert by_hand((ROOT / "README.md").read_text()) == []


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("balanced to .976 (.971)", [".976", ".971"]),
        ("saves 23 % and 5%", ["3 %", "5%"]),
        ("equal to 1.4e-06", ["4e-0"]),
        ("took 3:22 minutes", ["3:22"]),
        ("Python 3.11, `.976` of 64 experts, [7 s](a.md#.97)", ["7 s"]),
    ],
)
def test_figures_written_by_hand_are_found(written, found):
    assert by_hand(written) == found


def test_a_figure_that_was_edited_is_found(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text()
    name, _, block = BLOCK.findall(text)[0]
    digit = next(place for place, letter in enumerate(block) if letter.isdigit())
    edited = text.replace(block, f"{block[:digit]}{(int(block[digit]) + 1) % 10}{block[digit + 1 :]}")
    assert edited != text
    assert generated(edited) == text
    with pytest.raises(ValueError, match=r"no block of figures is called 'headlin'; expected one of .*, headline, "):
        generated(text.replace(f"figures: {name}", "figures: headlin"))


def test_a_folder_fills_the_blocks_of_its_command_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    page, folders = (ROOT / "docs/results/README.md").read_text(), {}
    for name, folder, _ in BLOCK.findall(page):
        folders.setdefault(written_by(name), set()).add(folder)
    assert set(folders) == {BENCH, LONG, SETTINGS, GPU}
    for command, (folder,) in folders.items():
        assert Results(Path(folder)).command == command
        assert generated(page, Path(folder)) == page


SHOWN = """                 A title that
                  is too long
┏━━━━━━┳━━━━━━━┓
┃      ┃ one   ┃
┃ name ┃ layer ┃
┡━━━━━━╇━━━━━━━┩
│ a    │ 0.964 │
│ b    │       │
└──────┴───────┘
said between
| c | d |
| --- | --- |
| 1 | 2 |
{"a": 1}
"""


def test_tables_that_a_step_printed_stand_below_its_command(tmp_path):
    run_all([Step("shown", [sys.executable, "-c", f"print({SHOWN!r})"], 20)], tmp_path / "a", "a", BENCH)
    results = Results(tmp_path / "a")
    command = "    " + results.steps["shown"]["command"]
    assert printed(results, "shown", "2") == f"{command}\n\n| c | d |\n| --- | --- |\n| 1 | 2 |"
    drawn = "| name | one layer |\n| --- | --- |\n| a | 0.964 |\n| b |  |"
    assert printed(results, "shown", "1") == f"{command}\n\nA title that is too long:\n\n{drawn}"
    with pytest.raises(ValueError, match=r"shown\.txt has 2 tables, and none of number '3'"):
        printed(results, "shown", "3")
    with pytest.raises(ValueError, match="has no results of the step other"):
        printed(results, "other")


def test_a_table_with_broken_cells_is_refused(tmp_path):
    text = SHOWN.replace("│ b    │       │", "│      │ more  │")
    run_all([Step("shown", [sys.executable, "-c", f"print({text!r})"], 20)], tmp_path / "a", "a", BENCH)
    with pytest.raises(ValueError, match=r"too wide, so that cells were broken: \['', 'more'\]"):
        printed(Results(tmp_path / "a"), "shown")


def printing(document: object) -> list[str]:
    return [sys.executable, "-c", f"print({json.dumps(document)!r})"]


@pytest.fixture
def folders(tmp_path):
    """Two folders with a step that both have, one that failed, and one that the second lacks."""
    steps = {
        "a": [Step("tiers", printing({"lru": {"tokens_per_s": 300, "spread": [290, 320]}}), 20),
              Step("main-job", [sys.executable, "-c", "raise SystemExit(1)"], 20),
              Step("planner", printing({"rows": []}), 20)],
        "b": [Step("tiers", printing({"lru": {"tokens_per_s": 450, "spread": [400, 460]}}), 20)],
    }  # fmt: skip
    for name, each in steps.items():
        run_all(each, tmp_path / name, name, BENCH)
    return [tmp_path / "a", tmp_path / "b"]


def test_a_step_measured_again_takes_its_earlier_place(folders):
    again = [Step("planner", printing({"rows": [1]}), 20), Step("tiers", printing({"lru": {"tokens_per_s": 310}}), 20)]
    assert run_again(again, "tiers", folders[0], BENCH) == 0
    results = Results(folders[0])
    assert list(results.steps) == ["tiers", "main-job", "planner"]
    assert results.document("tiers") == {"lru": {"tokens_per_s": 310}}
    assert results.document("planner") == {"rows": []}
    page = (folders[0] / "README.md").read_text()
    assert page.startswith("# a\n")
    assert re.search(r"^\| tiers \| ok, again on \d{4}-\d\d-\d\d, [0-9a-f]{8} \|", page, re.MULTILINE)
    with pytest.raises(ValueError, match=r"--again names 'lru', expected steps of make bench: planner, tiers"):
        run_again(again, "tiers, lru", folders[0], BENCH)
    with pytest.raises(ValueError, match="was written by make bench, not by make bench-long"):
        run_again(again, "tiers", folders[0], LONG)


def test_earlier_results_stay_where_a_step_fails_that_is_measured_again(folders, capsys):
    before = {path.name: path.read_bytes() for path in folders[0].iterdir() if path.suffix != ".log"}
    broken = Step("tiers", [sys.executable, "-c", "raise SystemExit('no disk')"], 20)
    assert run_again([broken], "tiers", folders[0], BENCH) == 1
    assert {path.name: path.read_bytes() for path in folders[0].iterdir() if path.suffix != ".log"} == before
    assert (folders[0] / "tiers.log").read_text() == "no disk\n"
    assert "earlier results stay" in capsys.readouterr().err


def test_a_step_that_a_folder_lacks_is_added_to_it(folders):
    run_again([Step("new", printing({"rows": [2]}), 20)], "new", folders[0], BENCH)
    summary = json.loads((folders[0] / "summary.json").read_text())
    assert [step["name"] for step in summary["steps"]] == ["tiers", "main-job", "planner", "new"]
    assert json.loads((folders[0] / "new.json").read_text()) == {"rows": [2]}


@pytest.mark.parametrize(("command", "ending"), [(BENCH, ""), (GPU, ""), (LONG, "-long"), (SETTINGS, "-settings")])
def test_folders_are_named_for_hardware_date_and_kind(command, ending):
    name = results_folder("Intel Xeon(R) 6982P", command).name
    assert re.fullmatch(rf"intel-xeon-r-6982p-\d{{4}}-\d\d-\d\d{ending}", name)


def compare(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["report", *map(str, words)])
    benchmarks.report.main()
    return capsys.readouterr().out


def test_folders_are_compared_by_every_number_of_a_step(folders, monkeypatch, capsys):
    shown = compare(monkeypatch, capsys, *folders, "--step", "tiers")
    assert "second / first" in shown
    assert "1.500" in shown
    found = json.loads(shown.splitlines()[-1])["figures"]
    assert found == {"lru.tokens_per_s": [300, 450], "lru.spread.0": [290, 400], "lru.spread.1": [320, 460]}


def test_a_step_that_no_folder_has_is_refused_by_name(folders, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", *map(str, folders), "--step", "main-job"])
    with pytest.raises(SystemExit) as stop:
        benchmarks.report.main()
    assert stop.value.code == 2
    assert (
        "no folder has figures of --step main-job; steps that have results: planner, tiers" in capsys.readouterr().err
    )


def test_a_folder_without_results_and_a_step_that_failed_are_named(folders, tmp_path):
    with pytest.raises(ValueError, match=r"has no summary\.json; expected a folder that `make bench`"):
        Results(tmp_path)
    with pytest.raises(ValueError, match=r"has no results of the step main-job; run it, and see its \.log"):
        Results(folders[0]).document("main-job")


@pytest.mark.parametrize("text", ['{"a": 1}', '{"steps": ["a"], "machine": {}}'])
def test_a_summary_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"summary\.json is no summary .*expected that of `make bench`"):
        Results(tmp_path)


def test_a_document_of_something_else_is_named(folders, monkeypatch, capsys):
    (folders[0] / "tiers.json").write_text('{"foreign": 1}')
    monkeypatch.setattr("sys.argv", ["report", str(folders[0])])
    with pytest.raises(SystemExit) as stop:
        benchmarks.report.main()
    assert stop.value.code == 2
    assert "a/tiers.json does not hold what the step prints (KeyError('lru'))" in capsys.readouterr().err


def test_numbers_of_a_document_by_their_paths():
    assert figures({"a": [1, {"b": 2.5}], "nan": float("nan"), "c": True, "d": None, "e": "text"}) == {
        "a.0": 1,
        "a.1.b": 2.5,
    }


def test_steps_of_the_benchmark_are_commands_that_parse(parse, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(benchmarks.bench, "LARGE", tmp_path / "none")
    for name in ("WIDE", "VAST", "FAMILY", "RECORDED"):
        monkeypatch.setattr(benchmarks.bench_long, name, tmp_path / name.lower())
    monkeypatch.setattr(benchmarks.bench_long, "RECORDED_TRACE", tmp_path)
    made = {benchmarks.bench: "model forecasts tiers", benchmarks.bench_long: "train-family-0 regimes tiers-family",
            benchmarks.bench_settings: "model price-512 tiers-half times-glm_5"}  # fmt: skip
    each = [module.preparation() + module.measurements() for module in made]
    for steps, expected in zip(each, made.values(), strict=True):
        names = [step.name for step in steps]
        assert len(set(names)) == len(names)
        assert set(expected.split()) <= set(names)
    steps = [step for steps in each for step in steps]
    assert {step.name: said for step in steps if (said := parse(shlex.split(as_typed(step.command))))} == {}
