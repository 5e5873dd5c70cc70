"""The run on one page: what went wrong first, then the figures."""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_run import figures, fuzz, tests
from gpu_run.machine import Machine
from gpu_run.processes import Ended

_LINES, _COLUMNS = 60, 100
# Of failures of one kind: the logs have the others.
_MOST_FAILURES = 4


@dataclass
class Done:
    """What became of a step.

    Attributes:
        name: Of the step.
        state: `ok`, `failed`, `out of time`, `skipped` or `stopped`.
        seconds: It took.
        detail: The last telling line of what went wrong, or why it was skipped.
        processes: That ran for it.
    """

    name: str
    state: str
    seconds: float = 0.0
    detail: str = ""
    processes: list[Ended] = field(default_factory=list)


def summary(
    machine: Machine, title: str, steps: Sequence[Done], parts: Mapping[str, Any]
) -> list[str]:
    """At most 60 lines of at most 100 columns.

    Args:
        machine: Where it ran.
        title: The first line.
        steps: In the order they were run.
        parts: What the benchmark measured in this run, by name.
    """
    ran = {done.name: done for done in steps if done.processes}
    sections: list[Callable[[], Iterable[str]]] = [
        lambda: figures.environment(parts),
        lambda: map(_step, steps),
        lambda: _failures(machine, ran, parts),
    ]
    sections += [lambda n=name: figures.lines(n, parts[n]) for name in _in_order(steps, parts)]
    sections += [lambda: _fuzz(machine, ran), lambda: _tests(ran)]
    page = [title]
    for section in sections:
        page += _readable(section)
    return [_clipped(line) for line in _fitting(page)]


def _in_order(steps: Sequence[Done], parts: Mapping[str, Any]) -> list[str]:
    return [done.name for done in steps if done.name in parts]


def _readable(section: Callable[[], Iterable[str]]) -> list[str]:
    """A section; where it cannot be read, the others still can."""
    try:
        return list(section())
    except Exception as error:
        return [f"cannot be summed up: {type(error).__name__}: {error}"]


def _fitting(page: Sequence[str]) -> Sequence[str]:
    """What there is room for: the most important comes first."""
    if len(page) <= _LINES:
        return page
    left = len(page) - _LINES + 1
    return [*page[: _LINES - 1], f"... {left} more lines: see the files of the results"]


def _clipped(line: str) -> str:
    line = line.rstrip()
    return line if len(line) <= _COLUMNS else line[: _COLUMNS - 3] + "..."


def _step(done: Done) -> str:
    return f"  {done.name:12} {done.state:12} {done.seconds:4.0f} s  {done.detail}"


def _failures(machine: Machine, ran: Mapping[str, Done], parts: Mapping[str, Any]) -> Iterable[str]:
    for name, part in parts.items():
        yield from _limited(f"{name}: ", figures.failures(name, part))
    if "fuzz" in ran:
        failed = fuzz.summary(machine.fuzz_log).failures
        for failure in failed[:_MOST_FAILURES]:
            yield f"fuzz: {failure.what}, {failure.count} failing:"
            yield f"  {failure.error}"
            yield from _wrapped(failure.command)
        if failed[_MOST_FAILURES:]:
            yield f"fuzz: {len(failed) - _MOST_FAILURES} more kinds of failures in fuzz.jsonl"
    for name in ("tests", "slow-tests"):
        if name in ran:
            found = tests.counts(ended.log for ended in ran[name].processes)
            yield from _limited(f"{name}: ", found.failed)
            yield from _limited(f"{name}, not finished: ", found.unfinished)


def _limited(prefix: str, told: Sequence[str]) -> Iterable[str]:
    yield from (prefix + line for line in told[:_MOST_FAILURES])
    if told[_MOST_FAILURES:]:
        yield f"{prefix}{len(told) - _MOST_FAILURES} more"


def _wrapped(command: str) -> list[str]:
    """A command in several lines that a shell takes as they are: the case's literal may be broken.

    Only between its fields, where Python allows it.
    """
    return textwrap.wrap(
        command,
        _COLUMNS,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _fuzz(machine: Machine, ran: Mapping[str, Done]) -> Iterable[str]:
    if "fuzz" not in ran:
        return []
    found = fuzz.summary(machine.fuzz_log)
    heading = f"fuzz: {found.cases} cases, seed {machine.seed}; cases and worst error / bound"
    return [heading, *found.table]


def _tests(ran: Mapping[str, Done]) -> Iterable[str]:
    for name in ("tests", "slow-tests"):
        if name in ran:
            outcomes = tests.counts(ended.log for ended in ran[name].processes).outcomes
            told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
            yield f"{name}: {told or 'none ran'}"
