"""What a command has to say, as data and as text."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """The outcome of a command.

    Attributes:
        data: What `--json` prints.
        shown: What is printed else: lines and rich tables.
        faults: Checks that failed, a line each; with any of them the exit code is 1.
    """

    data: dict[str, Any] = field(default_factory=dict)
    shown: list[Any] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
