"""The console command `switchcast COMMAND ...`; each command is also a module, such as `python -m runtime.infer`."""

import sys
from pathlib import Path

HELP = """usage: switchcast COMMAND [OPTIONS]

commands:
  collect    log the router trace of a model over text
  train      train a predictor of the next batch's expert load
  infer      run a model with replicated experts and verify its outputs
  simulate   replay recorded loads: is replication worth it?
  export     write a plan for SGLang, vLLM, TensorRT-LLM or vllm-ascend
  check-plan what one of these engines would get wrong with a plan file
  show       tables and pictures of a trace, or tables of trained predictors
  convert    read a load history that another system recorded
  pretrain   train the small bundled Switch model anew

`switchcast COMMAND --help` lists the options of a command.
"""


def collect() -> None:
    """Logs a router trace."""
    from data.collect import main

    main()


def convert() -> None:
    """Converts a load history."""
    from data.convert import main

    main()


def pretrain() -> None:
    """Trains the bundled model."""
    from data.pretrain.__main__ import main

    main()


def train() -> None:
    """Trains a predictor."""
    from train import main

    main()


def infer() -> None:
    """Runs a model."""
    from runtime.infer.__main__ import main

    main()


def simulate() -> None:
    """Replays loads."""
    from runtime.simulate.__main__ import main

    main()


def export() -> None:
    """Writes a plan for an engine."""
    from runtime.export.__main__ import main

    main()


def check_plan() -> None:
    """Checks a plan file of an engine."""
    from runtime.export.check import main

    main()


def show() -> None:
    """Shows a trace if the first argument is one, else predictors."""
    if any((Path(word) / "trace.json").exists() for word in sys.argv[1:2]):
        from data.show import main
    else:
        from predictor.show import main
    main()


COMMANDS = {
    command.__name__.replace("_", "-"): command
    for command in (collect, train, infer, simulate, export, check_plan, show, convert, pretrain)
}


def main() -> None:
    """Hands the remaining arguments to a command."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        print(HELP, end="")
        return
    if name == "--version":
        from switchcast import __version__

        print(__version__)
        return
    if name not in COMMANDS:
        print(f"error: '{name}' is no command; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"switchcast {name}", *sys.argv[2:]]
    COMMANDS[name]()


if __name__ == "__main__":
    main()
