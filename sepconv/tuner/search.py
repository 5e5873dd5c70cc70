"""The race for one problem: compile and check all candidates side by side, then time each alone."""

import os
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sepconv.ops.tuning import Problem, cache_bytes
from sepconv.ops.tuning_files import Choice, Entry
from sepconv.timing import Call, Timer
from sepconv.tuner.candidates import candidates
from sepconv.tuner.check import is_right
from sepconv.tuner.inputs import (
    Operands,
    make_operands,
    operands_in_turn,
    right_answer,
    run_choice,
)

# Compiling leaves Python's lock to others most of the time; the interpreter's language is patched
# in place and serves one thread.
_MOST_WORKERS = 8
_QUICK, _CAREFUL = 0.02, 0.1  # seconds a candidate is timed for, and one of the finalists
_FINALISTS = 3
# A gain below this is noise, and the default is the same on every machine.
_LEAST_GAIN = 0.02


def search(problem: Problem, timer: Timer, deadline: float) -> Entry | None:
    """Find the fastest choice that computes the right thing.

    Args:
        problem: The call.
        timer: Measures; see `sepconv.timing`.
        deadline: Of `time.monotonic()`; what has not been tried by then is left out.

    Returns:
        The winner beside the default; None where the deadline has passed before anything was
        timed, or where nothing is right, which warns.
    """
    choices = candidates(problem)
    right = _right(problem, choices, deadline)
    if not right:
        return None
    with torch.no_grad(), _on(problem.device):
        sets = operands_in_turn(problem, cache_bytes(problem.device))
        times: dict[Choice, float] = {}
        for choice in right:
            if times and time.monotonic() > deadline:
                break
            times[choice] = timer(_calls(problem, choice, sets), _QUICK)
        finalists = sorted(times, key=times.__getitem__)[:_FINALISTS]
        for choice in dict.fromkeys([*finalists, *(c for c in times if c is None)]):
            if time.monotonic() <= deadline:
                times[choice] = timer(_calls(problem, choice, sets), _CAREFUL)
    best = min(times, key=times.__getitem__)
    default_seconds = times.get(None, times[best])
    if None in times and times[best] > (1 - _LEAST_GAIN) * default_seconds:
        best = None
    return Entry(best, times[best], default_seconds, len(times), len(choices))


def _calls(problem: Problem, choice: Choice, sets: Sequence[Operands]) -> list[Call]:
    return [partial(run_choice, problem, operands, choice) for operands in sets]


def _right(problem: Problem, choices: Sequence[Choice], deadline: float) -> list[Choice]:
    """The choices that compile, run and give the right answer, in their order."""
    operands = make_operands(problem, integers=True)
    with torch.no_grad():
        expected = right_answer(problem, operands)
    # The first one alone: it prepares what Triton and torch prepare once per process.
    verdicts = {choices[0]: _verdict(problem, operands, choices[0], expected, deadline)}
    workers = 1 if problem.device < 0 else min(_MOST_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        futures = {
            choice: pool.submit(_verdict, problem, operands, choice, expected, deadline)
            for choice in choices[1:]
        }
        verdicts |= {choice: future.result() for choice, future in futures.items()}
    wrong = [choice for choice, verdict in verdicts.items() if verdict is False]
    if wrong:
        warnings.warn(
            f"{problem.key}: wrong results by {wrong}; they are left out. "
            "Please report this with the GPU and the versions of torch and Triton",
            stacklevel=2,
        )
    return [choice for choice, verdict in verdicts.items() if verdict]


def _verdict(
    problem: Problem,
    operands: Operands,
    choice: Choice,
    expected: tuple[Tensor, ...],
    deadline: float,
) -> bool | None:
    """Whether a choice is right; None where it was not tried: out of time, or it does not fit."""
    if choice is not None and time.monotonic() > deadline:
        return None
    try:
        with _on(problem.device):
            return is_right(problem, operands, choice, expected)
    except torch.cuda.OutOfMemoryError:
        return None
    except Exception as error:
        # Triton's errors for what does not fit or compile have no common class. Only an error of
        # the device itself ends the search: every later launch would fail.
        if "CUDA error" in str(error) or "HIP error" in str(error):
            raise
        return None


def _on(device: int) -> AbstractContextManager[Any]:
    return nullcontext() if device < 0 else torch.cuda.device(device)
