"""Compiles candidates ahead, in processes: whoever launches them later finds them on disk.

Triton compiles a kernel in one thread, half a second to some seconds each, and holds Python's lock
for much of it. So processes share the work (`compile_worker.py`) and leave what they make in
Triton's cache directory. None of them needs the GPU: it is enough to name the target.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Sequence
from threading import Thread
from typing import Any, NamedTuple

from sepconv._util import track
from sepconv.kernels.configs import default
from sepconv.ops.choice import Problem
from sepconv.ops.choice_files import Choice, choice_json
from sepconv.ops.kernel_modules import kernel_module

# Processes at most: each imports torch, some 0.4 GB.
_MOST_WORKERS = 32

Job = tuple[Problem, Choice]


class CompileTarget(NamedTuple):
    """What kernels are compiled for: the fields of Triton's `GPUTarget`."""

    backend: str
    arch: int | str
    warp_size: int


class Compiled(NamedTuple):
    """What came of compiling.

    Attributes:
        done: Jobs whose kernels are on disk now.
        failed: Reasons of those that could not be compiled, by job.
        unfinished: Jobs that time ran out for.
        kernels: Kernels compiled.
        cached: Kernels that were there.
        seconds: Time taken.
    """

    done: int
    failed: dict[Job, str]
    unfinished: frozenset[Job]
    kernels: int
    cached: int
    seconds: float


class _Group(NamedTuple):
    """Jobs that differ in sizes alone: many need the same kernel, so one process has them all."""

    op: str
    choice: Any  # as in files
    problems: list[dict[str, Any]]
    jobs: list[Job]


def compile_all(
    jobs: Iterable[Job],
    *,
    seconds: float | None = None,
    workers: int | None = None,
    target: CompileTarget | None = None,
) -> Compiled:
    """Fill Triton's cache with the kernels of some calls, those of the first jobs first.

    Args:
        jobs: Calls, each with what is to run it; what needs no kernel counts as done.
        seconds: Time limit: what is being compiled then is given up.
        workers: Processes; by default one per core that this process may use.
        target: What to compile for; by default this machine's GPU.

    Raises:
        RuntimeError: There is no GPU, and no target was named.

    Example:
        >>> compile_all([]).done
        0
    """
    start = time.monotonic()
    jobs = list(dict.fromkeys(jobs))
    # What has a name is the library's, or two kernels that have jobs of their own.
    groups = _groups([job for job in jobs if not isinstance(job[1], str)])
    failed: dict[Job, str] = {}
    left = {job for group in groups for job in group.jobs}
    kernels = cached = 0
    if groups:
        target = target or _target_of_this_gpu()
        count = min(workers or _cores(), len(groups))
        with _Pool(groups, count, target) as pool:
            for _ in track(range(len(groups)), "compiling"):
                wait = None if seconds is None else seconds - (time.monotonic() - start)
                found = pool.next_answer(wait)
                if found is None:
                    break
                group, answers = found
                for job, answer in zip(group.jobs, answers, strict=True):
                    left.discard(job)
                    kernels += answer.get("kernels", 0)
                    cached += answer.get("cached", 0)
                    if "error" in answer:
                        failed[job] = answer["error"]
    done = len(jobs) - len(left) - len(failed)
    return Compiled(done, failed, frozenset(left), kernels, cached, time.monotonic() - start)


class _Pool:
    """Worker processes, each fed by a thread of this one."""

    def __init__(self, groups: Sequence[_Group], count: int, target: CompileTarget) -> None:
        self._groups = deque(groups)
        self._answers: queue.Queue[tuple[_Group, list[dict[str, Any]]]] = queue.Queue()
        self._workers = [_Worker(target) for _ in range(count)]
        self._threads = [Thread(target=self._feed, args=(worker,)) for worker in self._workers]

    def __enter__(self) -> "_Pool":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._groups.clear()
        for worker in self._workers:
            worker.stop()
        for thread in self._threads:
            thread.join()

    def next_answer(self, wait: float | None) -> tuple[_Group, list[dict[str, Any]]] | None:
        """A group with one answer per job; None if none comes in time."""
        with contextlib.suppress(queue.Empty):
            return self._answers.get(timeout=None if wait is None else max(wait, 0.0))
        return None

    def _feed(self, worker: "_Worker") -> None:
        with contextlib.suppress(IndexError):
            while True:
                group = self._groups.popleft()
                self._answers.put((group, worker.compile(group)))
        worker.close()


class _Worker:
    """A process that compiles what it is told: a line of JSON each way."""

    def __init__(self, target: CompileTarget) -> None:
        self._target = target
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)

    def compile(self, group: _Group) -> list[dict[str, Any]]:
        """One answer per job of the group; where the process dies, that is the answer."""
        request = {"op": group.op, "choice": group.choice, "problems": group.problems}
        try:
            process = self._process = self._process or self._start()
            if self._stopped:
                process.kill()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answers: list[dict[str, Any]] = json.loads(process.stdout.readline())
        except (OSError, ValueError):
            return [{"error": self._last_words()}] * len(group.jobs)
        return answers

    def stop(self) -> None:
        """End the process, whatever it is at; from another thread than `compile`."""
        self._stopped = True
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End the process and let go of what belongs to it."""
        self._end()
        self._errors.close()

    def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        return process.wait()

    def _start(self) -> subprocess.Popen[str]:
        # This process may interpret kernels; that one never does.
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        return subprocess.Popen(
            [sys.executable, "-m", "sepconv.tuning.compile_worker", *map(str, self._target)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def _last_words(self) -> str:
        code = self._end()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"the compiling process ended ({code}): {lines[-1] if lines else 'no message'}"


def _cores() -> int:
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


def _groups(jobs: Sequence[Job]) -> list[_Group]:
    groups: dict[Any, _Group] = {}
    for problem, choice in jobs:
        config = choice or _default_config(problem)
        value = choice_json(problem.key, config)
        alike = problem._replace(x_shape=(), filter_shape=problem.filter_shape[1:], K=0)  # type: ignore[arg-type]
        group = groups.setdefault((alike, problem.M, config), _Group(problem.op, value, [], []))
        sizes = problem._asdict() | {"dtype": str(problem.dtype).removeprefix("torch.")}
        group.problems.append(sizes)
        group.jobs.append((problem, choice))
    return list(groups.values())


def _default_config(problem: Problem) -> Any:
    return default(problem.op, problem.dtype, problem.conv_shape)


def _target_of_this_gpu() -> CompileTarget:
    # Triton is imported where there are kernels to run.
    target = kernel_module("launch").active_target()
    return CompileTarget(target.backend, target.arch, target.warp_size)
