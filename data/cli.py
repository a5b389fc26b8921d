"""How every command begins and ends: options from a function's signature, and one clear line on a user's mistake."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, auto_cli

Result = TypeVar("Result")


class OneLineParser(ArgumentParser):
    """Says what is wrong in one line, without the usage of all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Hands the message to `user_errors`."""
        raise ValueError(f"{message}; see --help")


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns ValueError and OSError, which the packages raise for bad input, into `error: ...` and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None


def from_command_line(function: Callable[..., Result]) -> Result:
    """Calls a function with arguments from the command line, `--like-this` or `--like_this`; its docstring helps."""
    words = [word.partition("=") if word.startswith("--") else ("", "", word) for word in sys.argv[1:]]
    args = ["--" * bool(name) + name[2:].replace("-", "_") + equals + value for name, equals, value in words]
    result: Any = auto_cli(function, args=args, parser_class=OneLineParser)
    return result  # type: ignore[no-any-return]
