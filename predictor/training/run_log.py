"""RunLog: keeps the terminal quiet during training; messages and warnings of libraries go to a log file.

with RunLog() as log:
    ...                       # records are held until the file is known
    log.write_to(path)
"""

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

OWN = {"__main__", "train", "data", "predictor", "runtime"}
"""Packages whose messages are shown."""
LIGHTNING = ("lightning", "lightning.pytorch", "lightning.fabric")
"""Loggers with a terminal handler of their own."""


class RunLog:
    """Shows this project's messages on stderr, and collects the records and warnings of everything else for a file."""

    def __init__(self) -> None:
        self.held = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
        self.shown = logging.StreamHandler(sys.stderr)
        self.shown.addFilter(lambda record: record.name.partition(".")[0] in OWN)

    def __enter__(self) -> "RunLog":
        root = logging.getLogger()
        root.setLevel(logging.INFO)
        root.addHandler(self.held)
        root.addHandler(self.shown)
        logging.captureWarnings(True)
        for name in LIGHTNING:
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True
        return self

    def __exit__(self, *exc: object) -> None:
        logging.captureWarnings(False)
        for handler in (self.held, self.shown):
            logging.getLogger().removeHandler(handler)
        file = self.held.target
        self.held.close()
        if file is not None:
            file.close()

    def write_to(self, path: Path) -> None:
        """Writes the records held so far, and from now on every record, to the end of a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.held.setTarget(file)
        self.held.flushLevel = logging.NOTSET
        self.held.flush()
