"""Command lines: options from a function's signature, every user error in one line, no abbreviated options.

A command's `main` is `with user_errors(): from_command_line(function)`. A parser of another library joins in as
`class TrainParser(OneLine, LightningArgumentParser)`.
"""

import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, auto_cli, get_loader, set_loader

from data.errors import one_line

DEEPEST = 50
KINDS = {
    "<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'bool'>": "true or false",
    "<class 'str'>": "text", "<class 'list'>": "a list", "tuple with 2 elements": "a list of 2",
}  # fmt: skip
"""What values of a type are called, by the type as jsonargparse names it; those of Literal are listed."""
NOTHING = "<class 'NoneType'>"
Result = TypeVar("Result")

if TYPE_CHECKING:
    Base = ArgumentParser
else:
    Base = object  # the mixin has no parser of its own


class OneLine(Base):
    """Mixin for parsers: errors are one line without the usage of all options, and options must be written out.

    An abbreviation would change its meaning as soon as an option with the same beginning is added.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | settings)

    def parse_args(self, args: Any = None, *more: Any, **settings: Any) -> Any:
        """Parses arguments, none of which may be empty."""
        refuse_empty(sys.argv[1:] if args is None else args)
        return super().parse_args(args, *more, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ValueError, which `user_errors` prints."""
        raise ValueError(f"{self._plain(message)}; see --help")

    def _plain(self, message: str) -> str:
        """A message of jsonargparse about a value in plain words: option, value, what was expected."""

        def option(key: re.Match[str]) -> str:
            return f"--{key[1]}" if f"--{key[1]}" in self._option_string_actions else key[1]

        message = re.sub(r'Parser key "([\w.]+)"', option, message)
        found = re.fullmatch(r"(\S+):(.*)(?:\. Got|\n *Given) value: (.*)", message, re.DOTALL)
        kinds = re.findall(r"Expected an? (.*?)(?=\. Got value|\n|$)", found[2]) if found else []
        words = [KINDS.get(kind) or " or ".join(re.findall("'.*?'", kind)) for kind in kinds if kind != NOTHING]
        if found is None or not words or not all(words) or len(re.findall(r"\n *- ", found[2])) not in (0, len(kinds)):
            return message  # a class, or several reasons
        return f"{found[1]} is {found[3]!r}, expected {' or '.join(dict.fromkeys(words))}"


class HyphenFormatter(DefaultHelpFormatter):
    """Help with hyphens in the names of options."""

    def format_help(self) -> str:
        """The whole help, or the usage alone."""
        return hyphenated(super().format_help())


class OneLineParser(OneLine, ArgumentParser):
    """jsonargparse's parser with `OneLine` errors, whose options are shown with hyphens."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"formatter_class": HyphenFormatter} | settings)

    def _plain(self, message: str) -> str:
        return hyphenated(super()._plain(message))


def hyphenated(text: str) -> str:
    """A text in which options are written with hyphens: `--max-moves` for `--max_moves`."""
    return re.sub(r"--\w[\w.]*", lambda option: option[0].replace("_", "-"), text)


def refuse_empty(words: Sequence[str]) -> None:
    """Refuses an empty argument: as a path, it would be the working folder.

    Raises:
        ValueError: Naming the option, or the place among the arguments.
    """
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        option, equals, value = word.partition("=")
        if not word or (option.startswith("--") and equals and not value):
            name = option or (before if before.startswith("--") and "=" not in before else f"argument {place + 1}")
            raise ValueError(f"{name} is empty; is a shell variable not set? Give a value, or leave it out")


def load_yaml(text: str) -> Any:
    """Loads YAML without aliases and deep nesting: a few lines of either can keep a program busy for hours."""
    depth = accumulate((character in "[{") - (character in "]}") for character in text if character in "[]{}")
    if max(depth, default=0) > DEEPEST:
        raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep")
    if "&" in text and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
        raise yaml.YAMLError("it has an alias (*name), which is not supported; write the value out")
    return _load_yaml(text)


_load_yaml = get_loader("yaml")
set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))


@contextmanager
def user_errors(resume: str = "run the same command again to start over") -> Iterator[None]:
    """Prints ValueError and OSError, which the packages raise for bad input, as `error: ...`; the exit code is 2.

    SIGTERM ends the command with exit code 143, as an error does: temporary files are removed.

    Args:
        resume: What to do after Ctrl-C, printed as `interrupted; <resume>`; the exit code is 130.
    """
    ours = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"interrupted; {resume}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def print_json(document: object) -> None:
    """Prints one line of JSON for programs that read the output; at a terminal, where people have the text, nothing."""
    if not sys.stdout.isatty():
        print(json.dumps(document))


def from_command_line(function: Callable[..., Result]) -> Result:
    """Calls a function with arguments from the command line; its docstring becomes the help text.

    An option may be written with hyphens or underscores: `--like-this` or `--like_this`. A switch needs no value:
    `--check` alone is `--check true`.
    """
    words = [word.partition("=") if word.startswith("--") else ("", "", word) for word in sys.argv[1:]]
    args = ["--" * bool(name) + name[2:].replace("-", "_") + equals + value for name, equals, value in words]
    switches = {f"--{name}" for name, each in signature(function).parameters.items() if each.annotation is bool}
    for place, word in enumerate(args):
        if word in switches and (place + 1 == len(args) or args[place + 1].startswith("--")):
            args[place] = f"{word}=true"
    result: Any = auto_cli(function, args=args, parser_class=OneLineParser)
    return result  # type: ignore[no-any-return]
