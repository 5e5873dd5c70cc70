"""What became of a whole model, a line each."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from sepconv.reports.figures import AS_FAST, change, count, duration, gain, ratio
from sepconv.reports.table import WORSE

BETTER = "green"


class Total(NamedTuple):
    """One of the totals.

    Attributes:
        label: What it is of.
        text: The figures: what was and what is, where there are two.
        ratio: What is in units of what was, in words.
        remark: More about it.
        worse: True for a loss, False for a gain, None for neither.
        before: The number that was, where there is one.
        after: The number that is.
    """

    label: str
    text: str
    ratio: str = ""
    remark: str = ""
    worse: bool | None = None
    before: float | None = None
    after: float | None = None

    def sentence(self) -> str:
        """All of it in one line.

        >>> timed(3.6e-3, 72e-3, "on cpu, 2 threads").sentence()
        'one forward 3.6 ms > 72 ms, 20x SLOWER, on cpu, 2 threads'
        """
        return ", ".join(filter(None, (f"{self.label} {self.text}", self.ratio, self.remark)))


def counted(label: str, before: int, after: int) -> Total:
    """Of what is counted, and better less."""
    worse = True if after > before else None
    return Total(
        label, change(before, after, count), ratio(before, after), "", worse, before, after
    )


def timed(before: float, after: float, remark: str) -> Total:
    """Of one forward, in seconds."""
    told = gain(before, after)
    worse = None if told == AS_FAST else after > before
    both = f"{duration(before)} > {duration(after)}"
    return Total("one forward", both, told, remark, worse, before, after)


def totals_table(totals: Sequence[Total]) -> Table:
    """The totals below each other; what is too long is broken between words."""
    compared = [total for total in totals if total.ratio]
    width = max((len(total.text) for total in compared), default=0)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for total in totals:
        text = Text(f"{total.text:<{width}}" if total.ratio else total.text)
        if total.ratio:
            style = "" if total.worse is None else WORSE if total.worse else BETTER
            text.append("  ").append(total.ratio, style)
        if total.remark:
            text.append(f"{', ' if total.ratio else ' '}{total.remark}")
        grid.add_row(total.label, text)
    return grid
