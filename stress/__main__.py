"""Random cases against the plain loop over experts, and damaged files, in one folder that can be sent and compared.

    make stress
    python -m stress --out docs/results/my-machine-2026-11-27-stress

About twenty minutes on two cores; faults and the hour's soak are commands of their own. The folder holds what
`stress.exactness` and `stress.fuzz` printed, as that of `make bench` does. If one of them finds something, the exit
code is 1.
"""

from pathlib import Path

from benchmarks.bench import python
from benchmarks.support.results import STRESS
from benchmarks.support.steps import Step, processor, run_and_say
from data.cli import from_command_line, user_errors


def stress(out: Path | None = None) -> int:
    """Runs both and writes one folder with what they found.

    Args:
        out: Folder of the results; by default docs/results/, the processor's name, the date and "stress".

    Returns:
        The number of commands that found something.

    Raises:
        ValueError: If the folder exists already.
    """
    steps = [Step("exactness", python("stress.exactness"), 3600), Step("fuzz", python("stress.fuzz"), 1800)]
    return run_and_say(steps, processor(), STRESS, out)


def main() -> None:
    """Command line; in a pipe, the last line of stdout is JSON."""
    with user_errors():
        failed = from_command_line(stress)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
