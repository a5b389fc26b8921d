"""Messages of errors as one line of bounded length: libraries write pages, and values from damaged files are long."""

LONGEST_LINE = 1000


def one_line(error: BaseException) -> str:
    """An error's whole message; the kind of error where it has none."""
    line = " ".join(str(error).split()) or type(error).__name__
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, which names the reason; the kind of error where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
