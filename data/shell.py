"""Command lines that are printed to be typed next: `python`, `torchrun` and `switchcast` of the environment that runs.

typed("python -m predictor.show outputs/predictor")    # .venv/bin/python -m predictor.show outputs/predictor
"""

import shlex
import shutil
import sys
from os.path import samefile
from pathlib import Path

MODULES = {"python": "", "torchrun": " -m torch.distributed.run", "switchcast": " -m switchcast"}
"""Programs of an environment, and how its interpreter starts them."""


def typed(line: str) -> str:
    """A command line that works in the working folder; one that begins with another program is returned as it is.

    A program that the shell finds and that belongs to the running environment keeps its name, unless that environment
    lies in the working folder: there a path works in every shell, whichever environment is active in it.
    """
    program, blank, words = line.partition(" ")
    if program not in MODULES:
        return line
    interpreter = Path(sys.executable)
    if interpreter.is_relative_to(Path.cwd()):
        return f"{shlex.quote(str(interpreter.relative_to(Path.cwd())))}{MODULES[program]}{blank}{words}"
    found = shutil.which(program)
    if found and samefile(Path(found).parent, interpreter.parent):
        return line
    return f"{shlex.quote(str(interpreter))}{MODULES[program]}{blank}{words}"
