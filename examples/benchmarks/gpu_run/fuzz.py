"""The fuzz in many processes at once, and what its log says."""

import json
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu_run.machine import Machine
from gpu_run.processes import Command, Ended

OPS = ("depthwise", "pointwise", "separable")
DIRECTIONS = ("forward", "backward")
DTYPES = ("float32", "float16", "bfloat16", "float64")
_TESTS = [f"{op}-{direction}" for direction in DIRECTIONS for op in OPS]
_FEWEST, _MOST = len(_TESTS), 16
# A process needs ten seconds to start, and its last case may be compiled for ten more.
_AROUND = 20.0
# Begins what is said of a case that was running when its process ended.
_LOST = "its process"
_DIED_BEFORE = re.compile(r"^a run died in this case: .*? '(Case\(.*\))'$", re.MULTILINE)


def commands(machine: Machine, seconds: float) -> list[Command]:
    """Each op and direction by as many processes as there are cores, with seeds of their own."""
    count = max(_FEWEST, min(machine.cores, _MOST))
    limit = max(seconds - _AROUND, seconds / 3)
    asked = ["--hypothesis", f"--fuzz-seconds={limit:.0f}", f"--fuzz-log={machine.fuzz_log}"]
    asked += ["--fuzz-examples=3"] if machine.dry else ["--fuzz-examples=1000000"]
    return [
        Command(
            f"fuzz-{_TESTS[i % len(_TESTS)]}-{i // len(_TESTS)}",
            [
                *machine.pytest,
                # So that a failing case is printed when it fails.
                "--capture=sys",
                *asked,
                f"--hypothesis-seed={machine.seed + i // len(_TESTS)}",
                f"tests/fuzz/test_fuzz_ops.py::test_op[{_TESTS[i % len(_TESTS)]}]",
            ],
            machine.shared_by(count),
        )
        for i in range(count)
    ]


def note_lost_cases(machine: Machine, processes: Sequence[Ended]) -> None:
    """Add the cases that processes were in when they ended to the log."""
    lines = [json.dumps(line) for line in _lost_cases(machine.root, processes)]
    if lines:
        with machine.fuzz_log.open("a") as file:
            file.write("\n".join(lines) + "\n")


def _lost_cases(root: Path, processes: Sequence[Ended]) -> Iterator[dict[str, Any]]:
    for ended in processes:
        in_flight = root / ".hypothesis" / f"in-flight-{ended.pid}"
        if in_flight.exists():
            case = in_flight.read_text()
            in_flight.unlink()
            why = "was stopped" if ended.late else f"died: {_reason(ended.status)}"
            if case:  # else it was killed while it wrote the file
                yield _lost(case, f"{_LOST} {why}")
    # A process that starts reports, and forgets, what one that has died by then was in.
    for ended in processes:
        for case in _DIED_BEFORE.findall(ended.log.read_text(errors="replace")):
            yield _lost(case, f"{_LOST} died")


def _reason(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit {status}"


def _lost(case: str, error: str) -> dict[str, Any]:
    fields = dict(re.findall(r'\b(op|direction|dtype)="(\w+)"', case))
    return {"direction": "forward", "dtype": "float32", **fields, "error": error, "case": case}


class Failure(NamedTuple):
    """What went wrong with one op, direction and dtype.

    Attributes:
        what: Op, direction and dtype.
        count: Of failing cases, those met while shrinking included.
        error: Of the simplest.
        command: That runs the simplest again.
    """

    what: str
    count: int
    error: str
    command: str


class Summary(NamedTuple):
    """What a log says.

    Attributes:
        cases: In all.
        table: A row for each op and direction.
        failures: One for each op, direction and dtype, lost processes and simple cases first.
    """

    cases: int
    table: list[str]
    failures: list[Failure]


def summary(log: Path) -> Summary:
    """Sum up a log; a line that a killed process left unfinished does not count."""
    lines = list(_lines(log))
    kinds = [(op, direction) for op in OPS for direction in DIRECTIONS]
    table = [_row("", "", DTYPES), *(_row(*kind, _cells(lines, *kind)) for kind in kinds)]
    failed = [line for line in lines if "error" in line]
    keys = dict.fromkeys(map(_key, failed))
    failures = [_failure(key, [line for line in failed if _key(line) == key]) for key in keys]
    failures.sort(key=lambda failure: (_LOST not in failure.error, len(failure.command)))
    return Summary(len(lines), table, failures)


def _lines(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _key(line: dict[str, Any]) -> tuple[str, str, str]:
    return line["op"], line["direction"], line["dtype"]


def _row(op: str, direction: str, cells: Iterable[str]) -> str:
    return f"  {op:9}  {direction:8}" + "".join(f"{cell:>17}" for cell in cells)


def _cells(lines: Sequence[dict[str, Any]], op: str, direction: str) -> Iterator[str]:
    """Cases, and the worst error relative to the bound, of each dtype."""
    for dtype in DTYPES:
        met = [line for line in lines if _key(line) == (op, direction, dtype)]
        worst = max((line["worst"] for line in met if "worst" in line), default=None)
        failed = any("error" in line for line in met)
        shown = "FAILED" if failed else "" if worst is None else f"{worst:.3f}"
        yield f"{len(met)} {shown:>6}" if met else "-"


def _failure(key: tuple[str, str, str], lines: Sequence[dict[str, Any]]) -> Failure:
    simplest = min(lines, key=lambda line: len(line["case"]))
    command = f"python tests/fuzz/replay.py '{simplest['case']}'"
    return Failure(" ".join(key), len(lines), simplest["error"], command)
