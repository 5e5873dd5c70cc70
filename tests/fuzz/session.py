"""What one fuzz run is asked for, what it has done, and the case it is at.

The case is written to a file before it is launched: a kernel that takes the process, or the CUDA
context, with it does not take the case.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fuzz.case import Case
from fuzz.log import REPLAY, FuzzLog
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis.strategies import SearchStrategy

_ROUND = 250  # examples between two looks at the clock and a fresh seed
_LOST = ("CUDA error", "HIP error", "illegal memory access", "misaligned address", "launch failure")


@dataclass
class Tally:
    """Cases run of one op, direction and dtype, and the worst error relative to the bound."""

    cases: int = 0
    worst: float = 0.0
    case: str = ""

    def add(self, other: "Tally") -> None:
        self.cases += other.cases
        if other.worst >= self.worst:
            self.worst, self.case = other.worst, other.case


@dataclass
class FuzzSession:
    """One run of the fuzz.

    Attributes:
        full: Whether `--hypothesis` was given; else a small set, the same every time.
        examples: Cases per op and direction.
        seconds: Time limit per op and direction, or None.
        seed: Of the full fuzz.
        in_flight: File that holds the case being run.
        log: Told of each case as soon as it has run.
        tallies: By (op, direction, dtype).
        context_lost: Whether a crash has made this process unable to launch anything more.
    """

    full: bool
    examples: int
    seconds: float | None
    seed: int
    in_flight: Path
    log: FuzzLog = field(default_factory=FuzzLog)
    tallies: dict[tuple[str, str, str], Tally] = field(default_factory=dict)
    context_lost: bool = False

    def run(
        self,
        name: str,
        strategy: SearchStrategy[Case],
        check: Callable[[Case], float],
        examples: Iterable[Case] = (),
    ) -> None:
        """Check cases until the number or the time asked for is reached.

        Args:
            name: Of the test; its seed depends on it.
            strategy: Draws the cases.
            check: Returns the worst error relative to the bound, raises if it is too large.
            examples: Cases that are always run first.
        """
        deadline = time.monotonic() + (self.seconds or float("inf"))
        failed: dict[str, Exception] = {}

        def one(case: Case) -> None:
            if time.monotonic() >= deadline:
                # Shrinking ends here: what failed must still fail, or it would count as flaky.
                if error := failed.get(repr(case)):
                    raise error
                return
            try:
                self._one(case, check)
            except Exception as error:
                failed[repr(case)] = error
                raise

        one.__name__ = name
        done = 0
        while done < self.examples and time.monotonic() < deadline:
            count = min(_ROUND, self.examples - done)
            test = given(case=strategy)(one)
            for case in examples if done == 0 else ():
                test = example(case=case)(test)
            if self.full:
                test = seed(self.seed + done)(test)
            settings(
                max_examples=count,
                deadline=None,
                derandomize=not self.full,
                database=None,  # the seed draws the same cases again, and FOUND keeps what failed
                print_blob=False,
                suppress_health_check=list(HealthCheck),
            )(test)()
            done += count
            if sys.__stderr__ is not None and sys.__stderr__.isatty():
                print(f"\r{name} {done}/{self.examples} ", end="", file=sys.__stderr__)

    def _one(self, case: Case, check: Callable[[Case], float]) -> None:
        try:
            if self.context_lost:
                _run_elsewhere(case)
                return
            with self._announced(case), np.errstate(all="ignore"):
                worst = check(case)
        except BaseException as error:
            if any(sign in str(error) for sign in _LOST):
                self.context_lost = True  # nothing can be launched in this process any more
            error.add_note(f"to run it again: {REPLAY} '{case!r}'")
            if isinstance(error, Exception):
                self.log.failed(case, error)
            raise
        self.log.passed(case, worst)
        key = (case.op, case.direction, case.dtype)
        self.tallies.setdefault(key, Tally()).add(Tally(1, worst, repr(case)))

    @contextmanager
    def _announced(self, case: Case) -> Iterator[None]:
        self.in_flight.write_text(repr(case))
        try:
            yield
        finally:
            self.in_flight.unlink()


def _run_elsewhere(case: Case) -> None:
    """Run a case in a process of its own, so that shrinking goes on after a lost context."""
    replay = Path(__file__).with_name("replay.py")
    done = subprocess.run(
        [sys.executable, replay, repr(case)], capture_output=True, text=True, env=os.environ
    )
    if done.returncode:
        raise AssertionError(f"in a fresh process: {done.stderr[-2000:]}")
