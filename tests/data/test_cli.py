"""Every command line: help on stdout, errors in one line, no abbreviated options, and a hint after Ctrl-C."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import data.collect
import data.convert
import data.pretrain.__main__
import data.show
from data.cli import OneLineParser, from_command_line, user_errors


@dataclass(frozen=True)
class Sizes:
    """Sizes of a batch.

    Attributes:
        batches: Number of batches.
        smallest: Fewest sequences.
    """

    batches: int = 5
    smallest: int = 1


def command(source: Path, out: Path = Path("out"), max_new_tokens: int = 3, batching: Sizes = Sizes()):
    """Does something with a source.

    Args:
        source: Where to read from.
        out: Folder to write.
        max_new_tokens: Most tokens.
        batching: How text is cut.
    """
    return source, out, max_new_tokens, batching


def run(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["command", *args])
    with user_errors():
        return from_command_line(command)


def test_positional_nested_and_hyphenated(monkeypatch):
    expected = (Path("text-a"), Path("b-c"), 7, Sizes(9, 2))
    options = ["--out=b-c", "--max-new-tokens", "7", "--batching.batches", "9", "--batching.smallest=2"]
    assert run(monkeypatch, "text-a", *options) == expected


@pytest.mark.parametrize(
    ("args", "option"),
    [
        (["--ou", "x"], "--ou"),
        (["--ou=x"], "--ou=x"),
        (["--max-new", "3"], "--max-new"),
        (["--batching.batch", "3"], "--batching.batch"),
        (["--batching.batch=3"], "--batching.batch=3"),
        (["--batch.batches", "3"], "--batch.batches"),
        (["--batc", "{}"], "--batc"),
        (["--he"], "--he"),
        (["--outs", "x"], "--outs"),
    ],
)
def test_abbreviations_are_refused_by_name(monkeypatch, capsys, args, option):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "text", *args)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.endswith("; see --help\n")
    assert printed.err.count("\n") == 1
    assert option in printed.err.removesuffix("; see --help\n").split()


def options(
    source: Path,
    steps: int | None = None,
    start: int = 1,
    expert_bytes: float | None = None,
    order: Literal["subject", "shuffled"] | None = None,
    budget: tuple[int, int] = (1, 2),
    batching: Sizes = Sizes(),
):
    """Takes options of many types."""


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--steps", "x"], "--steps is 'x', expected a whole number"),
        (["--start=1.5"], "--start is '1.5', expected a whole number"),
        (["--expert_bytes", "abc"], "--expert-bytes is 'abc', expected a number"),
        (["--order", "x"], "--order is 'x', expected 'subject' or 'shuffled'"),
        (["--budget", "[1]"], "--budget is '[1]', expected a list of 2"),
        (["--batching.batches", "x"], "--batching.batches is 'x', expected a whole number"),
        (["--config", "nothere.yaml"], "--config: File does not exist"),
    ],
)
def test_wrong_values_are_named_in_plain_words(monkeypatch, args, said):
    monkeypatch.setattr("sys.argv", ["command", "text", *args])
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        from_command_line(options)
    assert "None" not in str(refused.value)


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ([""], "argument 1"),
        (["text", "--out", ""], "--out"),
        (["text", "--out="], "--out"),
        (["text", "--out=a", ""], "argument 3"),
    ],
)
def test_an_empty_argument_is_not_the_working_folder(monkeypatch, capsys, args, name):
    with pytest.raises(SystemExit):
        run(monkeypatch, *args)
    printed = capsys.readouterr()
    said = f"error: {name} is empty; is a shell variable not set? Give a value, or leave it out\n"
    assert (printed.out, printed.err) == ("", said)


def test_the_mixin_lets_a_caller_decide():
    parser = OneLineParser(allow_abbrev=True)
    parser.add_argument("--output", type=str)
    assert parser.parse_args(["--out", "x"]).output == "x"


def test_help_is_printed_on_stdout(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--help")
    printed = capsys.readouterr()
    assert stop.value.code == 0
    assert printed.err == ""
    for words in ("Does something with a source.", "Folder to write.", "--max-new-tokens", "--batching.batches"):
        assert words in printed.out


def test_ctrl_c_prints_how_to_go_on(capsys):
    for resume, line in (
        ((), "interrupted; run the same command again to start over\n"),
        (("add --ckpt_path last",), "interrupted; add --ckpt_path last\n"),
    ):
        with pytest.raises(SystemExit) as stop, user_errors(*resume):
            raise KeyboardInterrupt
        assert stop.value.code == 130
        assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (data.collect, ["Collects the router trace", "--batching.batches", "--top", "Seed of batch sizes"]),
        (data.convert, ["Converts a recording into a trace", "SGLang", "--model-id"]),
        (data.show, ["Prints how skewed the loads", "--out"]),
        (data.pretrain.__main__, ["Trains a model and writes bf16", "--recipe.steps", "qwen3_moe"]),
    ],
)
def test_help_of_every_command_of_this_package(module, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["command", "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    printed = capsys.readouterr()
    assert (stop.value.code, printed.err) == (0, "")
    for part in words:
        assert part in " ".join(printed.out.split())


def test_an_interrupted_collection_says_that_it_resumes(monkeypatch, capsys):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("data.collect.load_model", interrupted)
    monkeypatch.setattr("sys.argv", ["collect"])
    with pytest.raises(SystemExit):
        data.collect.main()
    assert capsys.readouterr().err == "interrupted; run the same command again to resume at the last finished shard\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [1, 1]\nbatches: [*a, *a]\n", "it has an alias (*name), which is not supported; write the value out"),
        ("batches: " + "[" * 60 + "\n", "it is nested more than 50 levels deep"),
        ("batches: [1\n", "expected"),
    ],
)
def test_a_settings_file_that_cannot_be_read(tmp_path, monkeypatch, text, says):
    def take(batches: int = 3) -> int:
        return batches

    (tmp_path / "settings.yaml").write_text(text)
    monkeypatch.setattr("sys.argv", ["take", "--config", str(tmp_path / "settings.yaml")])
    with pytest.raises(ValueError, match=re.escape(says)):
        from_command_line(take)
