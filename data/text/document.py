"""Document: one text of a stream, and ReadCounts: what became of the documents of one file."""

from dataclasses import dataclass, field


@dataclass
class ReadCounts:
    """Counts of one file's documents, as far as it has been read.

    Attributes:
        used: Documents that gave at least one sequence.
        too_short: Documents with fewer tokens than the shortest sequence.
        empty: Cells without text, or null.
        not_text: Cells that hold something other than text.
        trained_on: Documents left out because a predictor was trained on them.
        wrong: The first cell that is not text, such as "row 3 holds a number"; empty if there is none.
        given: Documents that were read, of which the last ones may not have been needed.
        ended: Whether the end of the file was read.
    """

    used: int = 0
    too_short: int = 0
    empty: int = 0
    not_text: int = 0
    trained_on: int = 0
    wrong: str = ""
    given: int = 0
    ended: bool = False

    @property
    def finished(self) -> bool:
        """Whether nothing of the file is left that was not needed."""
        return self.ended and self.given == self.used + self.too_short + self.trained_on


@dataclass(frozen=True)
class Document:
    """A text and its segment (topic, language, or source), and the counts of the file it comes from, if any."""

    segment: str
    text: str
    counts: ReadCounts | None = field(default=None, compare=False, repr=False)
