"""The tests that need a GPU, in shares that run at once, and what their logs say."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from gpu_run.machine import Machine
from gpu_run.processes import Command

# Beginnings of names. The first takes times, which it must not share. The last provokes a capture
# that fails, which costs torch 2.11 the process.
_ALONE = ("test_device_seconds", "test_work_that_cannot_be_captured")
_ALONE_FILE = "tests/benchmarks/test_gpu_bench.py"
# The step `sanitizer` runs it.
_SANITIZER = "test_19"
# What a dry run runs in their place.
_DRY_FILE = "tests/kernels/test_faults_kernels.py"
_DRY, _DRY_SLOW = "test_13 or test_14 or test_22", "test_26"
_NO_TESTS = 5  # pytest's exit status

_RESULT = re.compile(
    r"^(tests/\S+::.*?)(?: (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*)?$", re.MULTILINE
)
# What follows the last test: summaries, in which names stand alone too.
_AFTER = re.compile(r"^=+ (?!test session starts).*=$", re.MULTILINE)
_MESSAGE = re.compile(r"^(?:FAILED|ERROR) (tests/\S+::.*?) - (.*)$", re.MULTILINE)


def quick(machine: Machine) -> list[Command]:
    """All but the slow ones."""
    if machine.dry:
        return _shares(machine, "tests", ["-m", "not gpu", "-k", _DRY, _DRY_FILE])
    left_out = [f"--deselect={_ALONE_FILE}::{name}" for name in _ALONE]
    chosen = ["-m", "gpu and not slow", *left_out, *_files(machine)]
    return _shares(machine, "tests", chosen)


def slow(machine: Machine) -> list[Command]:
    """The slow ones, but for those that have a step of their own."""
    if machine.dry:
        return _shares(machine, "slow-tests", ["-m", "not gpu", "-k", _DRY_SLOW, _DRY_FILE])
    chosen = ["-m", "gpu and slow", "-k", f"not {_SANITIZER}"]
    return _shares(machine, "slow-tests", [*chosen, *_files(machine)])


def alone(machine: Machine) -> list[Command]:
    """Those that need a GPU, or a process, for themselves."""
    chosen = ["-m", "gpu", "-k", " or ".join(_ALONE), _ALONE_FILE]
    return [Command("alone", _pytest(machine, chosen), machine.environment)]


def _shares(machine: Machine, name: str, chosen: Sequence[str]) -> list[Command]:
    """Half as many processes as cores, since compilers run beside them."""
    count = max(machine.cores // 2, 4)
    return [
        Command(
            f"{name}-{i}",
            _pytest(machine, [f"--share={i}/{count}", *chosen]),
            machine.shared_by(count),
        )
        for i in range(1, count + 1)
    ]


def _pytest(machine: Machine, chosen: Sequence[str]) -> list[str]:
    return [*machine.pytest, "-v", "--tb=short", "-rfE", *chosen]


def _files(machine: Machine) -> list[str]:
    """Those with tests that need a GPU: collecting all takes longer than running some."""
    found = sorted((machine.root / "tests").rglob("test_*.py"))
    return [str(f.relative_to(machine.root)) for f in found if "mark.gpu" in f.read_text()]


def is_passed(status: int) -> bool:
    """Whether a share is in order; one that is empty has no tests."""
    return status in (0, _NO_TESTS)


class Counts(NamedTuple):
    """What logs of pytest say.

    Attributes:
        outcomes: How many passed, failed, ...
        failed: Names of those that failed, with the message where there is one.
        unfinished: Names of those that were running when their process ended.
    """

    outcomes: Counter[str]
    failed: list[str]
    unfinished: list[str]


def counts(logs: Iterable[Path]) -> Counts:
    """Sum up logs of `pytest -v`; it writes a name before, and the outcome after the test."""
    outcomes: Counter[str] = Counter()
    failed, unfinished = [], []
    for log in logs:
        text = log.read_text(errors="replace")
        messages = dict(_MESSAGE.findall(text))
        last = ""
        for name, outcome in _RESULT.findall(_AFTER.split(text)[0]):
            if outcome:
                outcomes[outcome.lower()] += 1
            if outcome in ("FAILED", "ERROR"):
                failed.append(f"{name}: {messages.get(name, outcome.lower())}")
            last = "" if outcome else name
        if last:
            unfinished.append(last.strip())
    return Counts(outcomes, failed, unfinished)
