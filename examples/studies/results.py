"""Figures of studies: a file of JSON with one on each line, and the commit that measured it."""

import json
import subprocess
from pathlib import Path
from typing import Any

from sepconv._util import write_atomically

ROOT = Path(__file__).resolve().parents[2]

Cell = dict[str, Any]
Cells = dict[str, Cell]


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
