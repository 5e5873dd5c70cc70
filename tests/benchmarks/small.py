"""Commands that do little, and what became of their processes."""

import sys
import time
from pathlib import Path

from gpu_run.processes import Command


def python(name: str, source: str) -> Command:
    return Command(name, [sys.executable, "-c", source])


def wait_until_gone(pid: int) -> None:
    """Wait for the end of a process that has been killed; the test's own limit is the only one."""
    while _is_there(pid):
        time.sleep(0.01)


def _is_there(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # ended, and nobody asked for its status
