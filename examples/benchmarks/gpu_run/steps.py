"""What there is to check and to measure, the most worth first."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gpu_run import fuzz, tests
from gpu_run.machine import Machine
from gpu_run.processes import Command, Ended

# Seconds of a step in which a process starts and ends: what the benchmark is told to leave.
_START = 10.0
# Seconds for the tests that stand alone.
_ALONE = 30.0


class Phase(NamedTuple):
    """Processes that run at once.

    Attributes:
        share: Of the time that the step has left.
        commands: What to start.
    """

    share: float
    commands: Sequence[Command]


class Step(NamedTuple):
    """One thing to do.

    Attributes:
        name: On the command line.
        seconds: It may take, where time is short.
        plan: Its phases, one after the other, for the seconds that it has; or why it cannot run.
        measures: Whether it is a part of the benchmark, and leaves results of that name.
        is_passed: Whether a process with that exit status is in order.
        after: What to do with the processes of a phase that are over.
    """

    name: str
    seconds: float
    plan: Callable[[Machine, float], Sequence[Phase] | str]
    measures: bool = False
    is_passed: Callable[[int], bool] = lambda status: status == 0
    after: Callable[[Machine, Sequence[Ended]], None] = lambda machine, processes: None


def _bench(part: str, seconds: float, *options: str) -> Step:
    """A part of the benchmark, which ends by itself a little before its limit."""

    def plan(machine: Machine, seconds: float) -> list[Phase]:
        limit = max(seconds - _START, seconds / 2)
        arguments = [sys.executable, "-m", "examples.benchmarks.bench", "gpu", "--part", part]
        arguments += ["--seconds", f"{limit:.0f}", "--out", str(machine.out), *options]
        arguments += ["--dry-run"] * machine.dry
        return [Phase(1.0, [Command(part, arguments, machine.environment)])]

    return Step(part, seconds, plan, measures=True)


def _fuzz(machine: Machine, seconds: float) -> list[Phase]:
    machine.fuzz_log.unlink(missing_ok=True)
    return [Phase(1.0, fuzz.commands(machine, seconds))]


def _tests(machine: Machine, seconds: float) -> list[Phase]:
    return [Phase(1.0, tests.quick(machine))]


def _slow_tests(machine: Machine, seconds: float) -> list[Phase]:
    share = max(1 - _ALONE / seconds, 0.5)
    return [Phase(share, tests.slow(machine)), Phase(1.0, tests.alone(machine))]


def _tables(machine: Machine, seconds: float) -> list[Phase]:
    arguments = [sys.executable, "examples/benchmarks/export_table.py", str(machine.out)]
    arguments += ["--dry-run"] * machine.dry
    return [Phase(1.0, [Command("tables", arguments, machine.environment)])]


def _sanitizer(machine: Machine, seconds: float) -> list[Phase] | str:
    """Two of the tool's checks of one small call of each kernel; a dry run makes the calls only."""
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if tool is None and not machine.dry:
        return "compute-sanitizer is not installed"
    # Memory that torch keeps for later hides what lies beyond a tensor.
    environment = {**machine.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def watched(check: str) -> list[Command]:
        watch = [] if machine.dry else [str(tool), f"--tool={check}", "--error-exitcode=9"]
        return [Command(check, [*watch, sys.executable, "tests/fuzz/every_kernel.py"], environment)]

    return [Phase(0.6, watched("memcheck")), Phase(1.0, watched("racecheck"))]


STEPS = (
    _bench("compile", 35),
    _bench("correctness", 40),
    _bench("models", 90, "--quick"),
    Step("fuzz", 60, _fuzz, after=fuzz.note_lost_cases),
    Step("tests", 60, _tests, is_passed=tests.is_passed),
    _bench("tune", 90),
    # What was tuned dies with a machine that is lent.
    Step("tables", 15, _tables),
    _bench("rivals", 170),
    _bench("kernelbench", 60),
    _bench("latency", 40),
    _bench("convert", 120),
    _bench("train", 90),
    _bench("ops", 120),
    Step("sanitizer", 90, _sanitizer),
    Step("slow-tests", 120, _slow_tests, is_passed=tests.is_passed),
)
