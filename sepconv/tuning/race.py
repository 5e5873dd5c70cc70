"""The race for one problem: each candidate is checked, then timed, one after the other."""

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sepconv.ops.choice import Problem, cache_bytes
from sepconv.ops.choice_files import Choice, Entry, Lost
from sepconv.timing import Call, CaptureError, Timer
from sepconv.tuning.check import is_right
from sepconv.tuning.inputs import (
    Operands,
    make_operands,
    operands_in_turn,
    right_answer,
    run_choice,
)

OUT_OF_TIME = "out of time"
_QUICK, _CAREFUL = 0.02, 0.1  # seconds a candidate is timed for, and one of the finalists
_FINALISTS = 3
# A gain below this is noise, and the default is the same on every machine.
LEAST_GAIN = 0.02


class Race:
    """Finds the fastest of one problem's candidates that computes the right thing.

    Args:
        problem: The call.
        choices: The candidates, in the order in which they have their turn.
        timer: Measures; see `sepconv.timing`.
        lost: Candidates that are not to be tried, and why.
    """

    def __init__(
        self,
        problem: Problem,
        choices: Sequence[Choice],
        timer: Timer,
        lost: Mapping[Choice, str] | None = None,
    ) -> None:
        self._problem, self._choices, self._timer = problem, choices, timer
        self._times: dict[Choice, float] = {}
        self._lost = dict(lost or {})

    def run(self, deadline: float) -> None:
        """Give every candidate its turn, and the best of them a second, longer one.

        Args:
            deadline: Of `time.monotonic()`; only the first candidate has its turn after it.

        Raises:
            CaptureError: A CUDA graph could not be captured: this process is not fit for more.
            RuntimeError: The device was lost.
        """
        with torch.no_grad(), _on(self._problem.device):
            try:
                checked = make_operands(self._problem, integers=True)
                expected = right_answer(self._problem, checked)
                sets = operands_in_turn(self._problem, cache_bytes(self._problem.device))
            except torch.cuda.OutOfMemoryError as error:
                self._lost |= dict.fromkeys(self._choices, _reason(error))
                return
            for choice in self._choices:
                if choice in self._lost:
                    continue
                if self._times and time.monotonic() > deadline:
                    break
                if self._is_right(choice, checked, expected):
                    self._time(choice, sets, _QUICK)
            finalists = sorted(self._times, key=self._times.__getitem__)[:_FINALISTS]
            for choice in dict.fromkeys([*finalists, *(c for c in self._times if c is None)]):
                if time.monotonic() <= deadline:
                    self._time(choice, sets, _CAREFUL)

    @property
    def entry(self) -> Entry:
        """What stands when the race is over, or where it was broken off."""
        times = self._times
        gone = {c: self._lost.get(c, OUT_OF_TIME) for c in self._choices if c not in times}
        lost = tuple(Lost(*item) for item in gone.items())
        counts = (len(times), len(self._choices), OUT_OF_TIME not in gone.values(), lost)
        if not times:
            return Entry(None, 0.0, 0.0, *counts)
        best = min(times, key=times.__getitem__)
        default_seconds = times.get(None, times[best])
        if None in times and times[best] > (1 - LEAST_GAIN) * default_seconds:
            best = None
        return Entry(best, times[best], default_seconds, *counts)

    def _is_right(self, choice: Choice, operands: Operands, expected: tuple[Tensor, ...]) -> bool:
        try:
            right = is_right(self._problem, operands, choice, expected)
        except Exception as error:
            self._lose(choice, error)
            return False
        if not right:
            self._lost[choice] = "wrong result"
            if not isinstance(choice, str):
                warnings.warn(
                    f"{self._problem.key}: wrong result by {choice}; it is left out. Please "
                    "report this with the GPU and the versions of torch and Triton",
                    stacklevel=2,
                )
        return right

    def _time(self, choice: Choice, sets: Sequence[Operands], duration: float) -> None:
        calls: list[Call] = [partial(run_choice, self._problem, s, choice) for s in sets]
        try:
            self._times[choice] = self._timer(calls, duration)
        except Exception as error:
            self._times.pop(choice, None)
            self._lose(choice, error)

    def _lose(self, choice: Choice, error: Exception) -> None:
        """Note why a candidate is out; raise where no other one could run either."""
        self._lost[choice] = _reason(error)
        if isinstance(error, torch.cuda.OutOfMemoryError):
            torch.cuda.empty_cache()
        # Triton's errors for what does not fit or compile have no common class.
        elif isinstance(error, CaptureError) or _is_of_the_device(error):
            raise error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def confirm_unfused(problem: Problem, entry: Entry, timer: Timer) -> Entry:
    """A fused call's entry once more, now that the kernels of its two halves are tuned.

    Before, its race saw both halves with their default block sizes.
    """
    if entry.choice == "unfused" or any(lost.choice == "unfused" for lost in entry.lost):
        return entry
    with torch.no_grad(), _on(problem.device):
        sets = operands_in_turn(problem, cache_bytes(problem.device))
        fused, unfused = (
            timer([partial(run_choice, problem, s, choice) for s in sets], _CAREFUL)
            for choice in (entry.choice, "unfused")
        )
    if unfused > (1 - LEAST_GAIN) * fused:
        return entry
    default_seconds = fused if entry.choice is None else entry.default_seconds
    return entry._replace(choice="unfused", seconds=unfused, default_seconds=default_seconds)


def _is_of_the_device(error: Exception) -> bool:
    return "CUDA error" in str(error) or "HIP error" in str(error)


def _on(device: int) -> AbstractContextManager[Any]:
    return nullcontext() if device < 0 else torch.cuda.device(device)
