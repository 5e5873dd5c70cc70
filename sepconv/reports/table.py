"""A table of layers for a terminal: names stay whole, and every column is there."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

from sepconv.reports.names import folded

WORSE = "bold red"
LEFT = "dim"

_GAP = 2
_LEAST_ROOM = 12  # for names, even where that makes lines too long


class Row(NamedTuple):
    """What is said of one layer.

    Attributes:
        name: Of the layer.
        cells: A text for each column. The first runs on over the empty ones after it.
        style: Of the whole row.
        worse: Indices of the cells that say that something became worse.
    """

    name: str
    cells: Sequence[str]
    style: str = ""
    worse: Sequence[int] = ()


@dataclass(frozen=True)
class Columns:
    """One way to tell the same of all layers.

    Attributes:
        titles: Of the columns after the name's; one may have two lines.
        rows: One for each layer.
        flush: So many columns are flush left, the others right.
    """

    titles: Sequence[str]
    rows: Sequence[Row]
    flush: int = 2

    def widths(self) -> list[int]:
        """Of each column; a first cell that runs on makes its own no wider."""
        widths = [max(map(len, title.split("\n"))) for title in self.titles]
        for row in self.rows:
            for i, cell in enumerate(row.cells):
                if i or reach(row) == 1:
                    widths[i] = max(widths[i], cell_len(cell))
        return widths


def reach(row: Row) -> int:
    """How many columns the first cell runs over.

    >>> reach(Row("conv", ["skipped: first convolution", "", "", "1.05M"]))
    3
    """
    return next((i for i, cell in enumerate(row.cells) if i and cell), len(row.cells))


class LayerTable:
    """Renders the first of several choices of columns that leaves room for all names, or the last.

    In the last, names that do not fit have their common beginnings in lines of their own.

    Args:
        title: Of the table.
        choices: The one that tells most first.

    Example:
        >>> row = Row("layer1.0.conv1", ["converted", "2"])
        >>> table = LayerTable("report", [Columns(["status", "rank"], [row])])
        >>> for line in table.lines(60):
        ...     print(line)
        report
        layer           status     rank
        -------------------------------
        layer1.0.conv1  converted  2
    """

    def __init__(self, title: str, choices: Sequence[Columns]) -> None:
        self._title, self._choices = title, choices

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield from self.lines(options.max_width, "-" if options.ascii_only else "\u2500")

    def lines(self, width: int, rule: str = "-") -> Iterator[Text]:
        """The table in lines of at most `width` characters, where its words are no longer."""
        for columns in self._choices:
            widths = columns.widths()
            room = max(width - _GAP * len(widths) - sum(widths), _LEAST_ROOM)
            if all(cell_len(row.name) <= room for row in columns.rows):
                break
        lines = folded([row.name for row in columns.rows], room)
        longest = max((cell_len(text) for text, row in lines if row is not None), default=0)
        layout = _Layout(columns, widths, max(min(longest, room), len("layer")), width)
        yield Text(self._title, "bold")
        yield from layout.head(rule)
        for text, index in lines:
            yield from (
                [Text(text, LEFT)] if index is None else layout.row(text, columns.rows[index])
            )


class _Layout:
    """Where each column stands.

    Args:
        columns: What to show.
        widths: Of the columns.
        name_width: Of the names before them.
        width: Of the terminal.
    """

    def __init__(
        self, columns: Columns, widths: Sequence[int], name_width: int, width: int
    ) -> None:
        self._columns, self._name_width, self._width = columns, name_width, width
        self._place(widths)
        # What runs on gets the room that is left, where it needs it.
        missing = max((cell_len(row.cells[0]) - self._span(row) for row in columns.rows), default=0)
        wider = max(min(missing, width - self._end), 0)
        self._place([widths[0] + wider, *widths[1:]])

    def _place(self, widths: Sequence[int]) -> None:
        starts = accumulate(widths, lambda at, n: at + n + _GAP, initial=self._name_width + _GAP)
        *self._starts, after = starts
        self._widths, self._end = widths, after - _GAP

    def _span(self, row: Row) -> int:
        """How wide a row's first cell may be."""
        end = reach(row)
        last = self._width if end == len(self._starts) else self._starts[end] - _GAP
        return max(last - self._starts[0], 1)

    def head(self, rule: str) -> Iterator[Text]:
        """The titles and a line below them."""
        titles = [title.split("\n") for title in self._columns.titles]
        height = max(map(len, titles))
        for i in range(height):
            missing = [height - len(title) for title in titles]
            cells = [t[i - n] if i >= n else "" for t, n in zip(titles, missing, strict=True)]
            yield Text(self._line("layer" if i == height - 1 else "", cells), "bold")
        yield Text(rule * self._end, LEFT)

    def row(self, name: str, row: Row) -> Iterator[Text]:
        """A layer, in one line where its name and what runs on fit."""
        if cell_len(name) > self._name_width:
            yield Text(name, row.style)
            name = ""
        first, *more = textwrap.wrap(row.cells[0], self._span(row), break_long_words=False) or [""]
        text = Text(self._line(name, [first, *row.cells[1:]]), row.style)
        for i in row.worse:
            text.stylize(WORSE, self._starts[i], self._starts[i] + self._widths[i])
        yield text
        for rest in more:
            yield Text(_padded("", self._starts[0]) + rest, row.style)

    def _line(self, name: str, cells: Sequence[str]) -> str:
        line = name
        for i, cell in enumerate(cells):
            if cell:
                indent = 0 if i < self._columns.flush else self._widths[i] - cell_len(cell)
                line = _padded(line, self._starts[i] + indent) + cell
        return line


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))
