"""The GPU's benchmark: ceilings, ops, whole networks, against the best that a user could run.

Every part states its environment, ends within its time, and goes on after a case that fails. All
ratios compare times of one run. What was measured is written after every case. Where a failure
costs the process its GPU, a fresh one takes its place and goes on after what failed. `--dry-run`
with TRITON_INTERPRET=1 runs every part on a CPU with tiny shapes: it proves that the scripts work,
and its figures mean nothing.
"""

import argparse
import datetime
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from examples.benchmarks.bench.gpu import (
    ceilings,
    compiling,
    convert,
    correctness,
    kernelbench,
    latency,
    models,
    ops,
    train,
    tuning,
)
from examples.benchmarks.bench.gpu.environment import describe
from examples.benchmarks.bench.gpu.measure import Bench, ProcessSpentError
from examples.benchmarks.bench.gpu.results import ResultFile
from sepconv.ops.backend import can_run_kernels
from sepconv.ops.choice import forget


class _Part(NamedTuple):
    """A part of the benchmark.

    Attributes:
        run: Measures its cases.
        share: Of the time of `--part all`.
        seconds: Its time limit where it is asked for by name.
    """

    run: Callable[[Bench], None]
    share: float
    seconds: float = 160.0


class _Left(NamedTuple):
    """What a process leaves to the one that takes its place."""

    parts: Sequence[str]
    seconds: float
    out: Path


# The one that fills the cache first; last the one that can use whatever time is left.
_PARTS = {
    "compile": _Part(compiling.run, 0.08),
    "ceilings": _Part(ceilings.run, 0.02),
    "correctness": _Part(correctness.run, 0.06),
    "tune": _Part(tuning.run, 0.17),
    "ops": _Part(ops.run, 0.14),
    "kernelbench": _Part(kernelbench.run, 0.09),
    "models": _Part(models.run, 0.14),
    "convert": _Part(convert.run, 0.08),
    "train": _Part(train.run, 0.06),
    "latency": _Part(latency.run, 0.04),
    "rivals": _Part(models.run_rivals, 0.12, seconds=480.0),
}
_ALL_SECONDS = 480.0
# The case that says why a part broke; gone when the part is gone on with.
_STOPPED = "the part stopped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m examples.benchmarks.bench gpu`."""
    parser.add_argument(
        "--part", nargs="+", choices=[*_PARTS, "all"], default=["all"], help="what to measure"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for <gpu>-<date>.json and .md; by default a new one for temporary files",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"time limit in all (default {_ALL_SECONDS:g} for all parts, else the sum of "
        f"{_PARTS['ops'].seconds:g} for each and {_PARTS['rivals'].seconds:g} for rivals); cases "
        "that do not fit are noted",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the cases that the newest file holds of these parts; by default they "
        "start anew, and other parts in the file stay",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="leave out what takes a minute or more to prepare, and say so",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU, with TRITON_INTERPRET=1"
    )


def run(args: argparse.Namespace) -> None:
    """Measure the parts, print their tables, and keep them in files after each case."""
    with _own_caches() if args.dry_run else nullcontext():
        left = _run(args)
    if left is not None:
        _go_on_elsewhere(args, left)


@contextmanager
def _own_caches() -> Iterator[None]:
    """Keep what is no result for this machine out of the user's caches."""
    names = ("SEPCONV_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {name: str(Path(folder, name)) for name in names}
        try:
            yield
        finally:
            forget()
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _run(args: argparse.Namespace) -> _Left | None:
    """Measure until the end, or until the process can measure no more: what is left then."""
    bench = _bench(args.dry_run, args.quick)
    parts = list(_PARTS) if "all" in args.part else list(dict.fromkeys(args.part))
    end = time.monotonic() + (args.seconds or _default_seconds(args.part))
    out = args.out or Path(tempfile.mkdtemp(prefix="sepconv-bench-"))
    path = _result_path(out, bench, args.resume)
    file = ResultFile(path, describe(bench.device), _copy_bandwidth(bench))
    if not args.resume:
        file.forget(parts)
    for i, part in enumerate(parts):
        share = _PARTS[part].share / sum(_PARTS[name].share for name in parts[i:])
        over = _measure(bench, file, part, share * (end - time.monotonic()))
        Console().print(file.table(part), soft_wrap=True, markup=False)
        if over is not None and parts[i + over :]:
            return _Left(parts[i + over :], end - time.monotonic(), out)
    print(f"kept in {path}", file=sys.stderr)
    return None


def _measure(bench: Bench, file: ResultFile, part: str, seconds: float) -> int | None:
    """Measure a part.

    Returns:
        None; or where this process can measure no more, the number of parts that are over: 0 if
        another process is to go on with this one, 1 if it stopped for good.
    """
    known, before = file.known(part)
    start = time.monotonic()
    bench.start_part(seconds, [case for case in known if case.name != _STOPPED])
    bench.save = lambda: file.keep(part, bench.cases, before + time.monotonic() - start)
    over = None
    try:
        _PARTS[part].run(bench)
    except ProcessSpentError as spent:
        print(f"{part}: {spent}: {spent.__cause__}", file=sys.stderr)
        over = 0
    except Exception as error:
        # A part that breaks costs its own figures, not those of the others.
        print(f"{part}: {type(error).__name__}: {error}", file=sys.stderr)
        case = bench.case(part, _STOPPED)
        case.errors[part] = f"{type(error).__name__}: {error}"[:300]
        over = 1 if bench.is_spent(error) else None
    bench.save()
    return over


def _go_on_elsewhere(args: argparse.Namespace, left: _Left) -> None:
    """Replace this process by a fresh one that measures what is left."""
    print("this process can measure no more: a fresh one goes on", file=sys.stderr)
    command = [
        sys.executable,
        "-m",
        "examples.benchmarks.bench",
        "gpu",
        "--resume",
        "--part",
        *left.parts,
    ]
    command += ["--seconds", f"{max(left.seconds, 1.0):.0f}", "--out", str(left.out)]
    command += ["--quick"] * args.quick + ["--dry-run"] * args.dry_run
    sys.stdout.flush()
    sys.stderr.flush()
    _inherit_no_handles()
    os.execv(sys.executable, command)


def _inherit_no_handles() -> None:
    """Have the system close all but the standard files: a GPU's memory is held by open handles."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            # One of them is the listing's own, which is closed by now.
            with suppress(OSError):
                os.set_inheritable(int(name), False)


def _default_seconds(asked: Sequence[str]) -> float:
    if "all" in asked:
        return _ALL_SECONDS
    return sum(_PARTS[part].seconds for part in set(asked))


def _copy_bandwidth(bench: Bench) -> float | None:
    """Bytes a second that a copy reads and writes: shares are of the one of the same process."""
    try:
        case = ceilings.copy(bench)
    except ProcessSpentError as spent:
        sys.exit(f"the GPU fails at a copy: {spent.__cause__}")
    seconds = case.times.get("library")
    return case.useful_bytes / seconds if seconds and case.useful_bytes else None


def _bench(dry: bool, quick: bool) -> Bench:
    if dry:
        if not can_run_kernels(torch.empty(0)):
            sys.exit("--dry-run: start Python with TRITON_INTERPRET=1")
        # It imports Triton, for which a real run waits until there is a kernel to launch.
        obstacle = import_module("examples.benchmarks.bench.gpu.interpreter").obstacle()
        if obstacle:
            sys.exit(f"--dry-run: {obstacle}")
        return Bench("cpu", dry=True, quick=quick)
    if not torch.cuda.is_available():
        sys.exit("no GPU: torch.cuda.is_available() is false (try --dry-run)")
    # The baselines at their best, and both sides by the same rules. Set by the older of torch's two
    # interfaces: parts of torch refuse to read what the newer one has set.
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True
    return Bench("cuda", dry=False, quick=quick)


def _result_path(folder: Path, bench: Bench, resume: bool) -> Path:
    """Today's file of this GPU; the newest one to go on with."""
    name = "dry-run" if bench.dry else torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    today = folder / f"{slug}-{datetime.date.today():%Y-%m-%d}.json"
    found = sorted(folder.glob(f"{slug}-????-??-??.json")) if resume else []
    return found[-1] if found else today
