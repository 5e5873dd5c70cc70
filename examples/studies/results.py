"""Figures of studies: a file of JSON with one on each line, and tables of them in a page."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table as RichTable

from sepconv._util import write_atomically

ROOT = Path(__file__).resolve().parents[2]

Cell = dict[str, Any]
Cells = dict[str, Cell]
Rows = list[list[str]]


class Table(NamedTuple):
    """Titles of the columns, and rows as wide."""

    header: list[str]
    rows: Rows

    def show(self, title: str) -> None:
        """Print it."""
        table = RichTable(*self.header, title=title)
        for row in self.rows:
            table.add_row(*row)
        Console().print(table)

    def lines(self) -> list[str]:
        """In Markdown."""
        every = [self.header, ["---"] * len(self.header), *self.rows]
        return ["| " + " | ".join(row) + " |" for row in every]


def read(path: Path) -> Cells:
    """What is known, by cell."""
    return json.loads(path.read_text()) if path.exists() else {}


def keep(path: Path, key: str, cell: Cell) -> None:
    """Add a cell to the results, each on a line of its own."""
    cells = read(path) | {key: cell}
    lines = [f"{json.dumps(key)}: {json.dumps(cells[key])}" for key in sorted(cells)]
    write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")


def commit() -> str:
    """The code that measures; `+`: with changes."""
    head = ["git", "rev-parse", "--short", "HEAD"]
    name = subprocess.run(head, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "sepconv"], cwd=ROOT)
    return name + "+" * bool(changed.returncode)


def into_page(page: Path, parts: Mapping[str, Sequence[str]]) -> None:
    """Put lines between a part's marks: `<!-- show: NAME -->` and `<!-- end of NAME -->`."""
    text = page.read_text()
    for name, lines in parts.items():
        begin, end = f"<!-- show: {name} -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = before + "\n".join([begin, *lines, end]) + rest.split(end)[1]
    write_atomically(page, text)
