"""The fuzz's record in a file: one JSON line for each case, written as soon as it has run."""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.case import Case

REPLAY = "python tests/fuzz/replay.py"


@dataclass
class FuzzLog:
    """Where a fuzz tells, at once, what became of each case.

    Several processes may share one file: a line is appended by a single write.

    Attributes:
        path: The file, or None.
        aloud: Whether failing cases are printed too.
    """

    path: Path | None = None
    aloud: bool = False
    _shortest: dict[tuple[str, str], int] = field(default_factory=dict)

    def passed(self, case: Case, worst: float) -> None:
        """Record a case and its worst error relative to the bound."""
        self._append(case, {"worst": worst})

    def failed(self, case: Case, error: Exception) -> None:
        """Record a case, whole, and why it failed."""
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        self._append(case, {"error": first, "case": repr(case)})
        # Shrinking fails over and over: only what is simpler than before is news.
        key = (case.op, case.direction)
        length = len(repr(case))
        if self.aloud and length < self._shortest.get(key, length + 1):
            self._shortest[key] = length
            print(f"\nFAILED {first}\n  {REPLAY} '{case!r}'", file=sys.__stderr__, flush=True)

    def _append(self, case: Case, outcome: dict[str, object]) -> None:
        if self.path is None:
            return
        line = {"op": case.op, "direction": case.direction, "dtype": case.dtype, **outcome}
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, (json.dumps(line) + "\n").encode())
        finally:
            os.close(file)
