"""Processes of one step: started together, each with a log, all ended when their time is up."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# Seconds between asking a process to end and ending it.
GRACE = 5.0
_LOOK = 0.05  # seconds between two looks at the processes


class Command(NamedTuple):
    """A process to start.

    Attributes:
        name: Of its log.
        arguments: The program and its arguments.
        environment: What it gets beside the runner's own.
    """

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = {}


class Ended(NamedTuple):
    """A process that is over.

    Attributes:
        name: Of its command.
        pid: It had.
        log: All that it printed.
        status: Its exit status, or minus the signal that ended it.
        late: Whether it had to be stopped.
    """

    name: str
    pid: int
    log: Path
    status: int
    late: bool


class Stop:
    """Whether the runner itself has been told to stop."""

    def __init__(self) -> None:
        self.told = False

    def listen(self) -> None:
        """Take Ctrl-C and SIGTERM for the wish to stop."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hear)

    def _hear(self, *_: object) -> None:
        self.told = True


def run_together(
    commands: Sequence[Command],
    seconds: float,
    logs: Path,
    folder: Path,
    stop: Callable[[], bool],
    grace: float = GRACE,
) -> list[Ended]:
    """Start all commands, each in a process group of its own, and wait for the last.

    Args:
        commands: What to start.
        seconds: After which those that still run are ended, with all that they have started.
        logs: Folder for NAME.log of each.
        folder: Where they run.
        stop: Asked all the while: true ends them at once.
        grace: Seconds that they are left to end by themselves.
    """
    started: list[subprocess.Popen[bytes]] = []
    late: set[int] = set()
    end = time.monotonic() + seconds
    try:
        for command in commands:
            started.append(_start(command, logs, folder))
        while any(p.poll() is None for p in started) and time.monotonic() < end and not stop():
            time.sleep(_LOOK)
    finally:
        late = {p.pid for p in started if p.poll() is None}
        _end(started, grace)
    return [
        Ended(c.name, p.pid, log_of(c, logs), _status(p), p.pid in late)
        for c, p in zip(commands, started, strict=True)
    ]


def log_of(command: Command, logs: Path) -> Path:
    """The file that holds what a command prints."""
    return logs / f"{command.name}.log"


def _start(command: Command, logs: Path, folder: Path) -> subprocess.Popen[bytes]:
    with log_of(command, logs).open("wb") as log:
        return subprocess.Popen(
            command.arguments,
            cwd=folder,
            env=os.environ | command.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """End what still runs, and whatever the processes have left behind."""
    running = [p for p in processes if p.poll() is None]
    for process in running:
        _signal_group(process, signal.SIGTERM)
    end = time.monotonic() + grace
    while any(p.poll() is None for p in running) and time.monotonic() < end:
        time.sleep(_LOOK)
    for process in processes:
        _signal_group(process, signal.SIGKILL)
    for process in running:
        # Where a driver holds it, nothing more can be done about it.
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # all of it has ended
        os.killpg(process.pid, number)


def _status(process: subprocess.Popen[bytes]) -> int:
    return -signal.SIGKILL if process.returncode is None else process.returncode
