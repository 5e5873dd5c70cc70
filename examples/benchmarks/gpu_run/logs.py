"""One file with the logs of all steps, and what a log has to say in a line."""

import re
from pathlib import Path

# One file of the results may have 16 MiB.
_MOST, _MOST_EACH = 15 << 20, 1 << 18
_TAIL = 1 << 16  # bytes of a log that are searched for what it has to say
_TELLING = re.compile(
    r"^(E  +\S|FAILED |ERROR[ :]|========= .*[Ee]rror|Fatal Python error|.*: error: "
    r"|[\w.]*(Error|Exception|Interrupt)(:|$))"
)


class Logs:
    """A file that grows by a log at a time, within a limit.

    Args:
        path: Of the file; what it held is dropped.
        most: Bytes of the whole file.
        most_each: Bytes of one log: of a longer one the middle is left out.
    """

    def __init__(self, path: Path, most: int = _MOST, most_each: int = _MOST_EACH) -> None:
        self._path, self._left, self._most_each = path, most, most_each
        path.write_bytes(b"")

    def add(self, title: str, log: Path) -> None:
        """Append a log under a title."""
        heading = f"===== {title}\n".encode()
        text = shortened(log, min(self._most_each, max(self._left - len(heading), 0)))
        if text and not text.endswith(b"\n"):
            text += b"\n"
        with self._path.open("ab") as file:
            file.write(heading + text + b"\n")
        self._left -= len(heading) + len(text) + 1


def shortened(log: Path, most: int) -> bytes:
    """The beginning and the end of a log, where it has more than `most` bytes."""
    if not log.exists():
        return b""
    size, half = log.stat().st_size, most // 2
    with log.open("rb") as file:
        if size <= most:
            return file.read()
        first = file.read(half)
        file.seek(size - half)
        last = file.read()
    return first + f"\n[... {size - 2 * half:,} bytes left out ...]\n".encode() + last


def telling_line(log: Path) -> str:
    """The last line of a log that names an error, else its last line."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - _TAIL, 0))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if _TELLING.match(line):
            return line
    return lines[-1] if lines else ""
