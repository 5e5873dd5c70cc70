"""The GPU's benchmark: ceilings, ops, whole networks, against the best that a user could run.

Every part states its environment, ends within its time, and goes on after a case that fails. All
ratios compare times of one run. `--dry-run` with TRITON_INTERPRET=1 runs every part on a CPU with
tiny shapes: it proves that the scripts work, and its figures mean nothing.
"""

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from sepconv.bench.gpu import (
    ceilings,
    convert,
    kernelbench,
    latency,
    models,
    ops,
    results,
    train,
    tuning,
)
from sepconv.bench.gpu.environment import describe
from sepconv.bench.gpu.measure import Bench
from sepconv.ops.backend import can_run_kernels
from sepconv.ops.tuning import forget

# Name, what runs it, its share of the time of `--part all`.
_PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "ceilings": (ceilings.run, 0.02),
    "tune": (tuning.run, 0.25),
    "ops": (ops.run, 0.20),
    "kernelbench": (kernelbench.run, 0.10),
    "models": (models.run, 0.18),
    "convert": (convert.run, 0.12),
    "train": (train.run, 0.08),
    "latency": (latency.run, 0.05),
}
_PART_SECONDS, _ALL_SECONDS = 160.0, 480.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m sepconv.bench gpu`."""
    parser.add_argument(
        "--part", nargs="+", choices=[*_PARTS, "all"], default=["all"], help="what to measure"
    )
    parser.add_argument("--out", type=Path, help="folder for <gpu>-<date>.json and .md")
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"time limit in all (default {_PART_SECONDS:g} for each part, {_ALL_SECONDS:g} "
        "for all); cases that do not fit are noted",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU, with TRITON_INTERPRET=1"
    )


def run(args: argparse.Namespace) -> None:
    """Measure the parts, print their tables, and keep them in files after each part."""
    if not args.dry_run:
        _run(args)
        return
    # What the interpreter finds fast must not reach the user's cache.
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("SEPCONV_CACHE_DIR")
        os.environ["SEPCONV_CACHE_DIR"] = folder
        try:
            _run(args)
        finally:
            forget()
            if before is None:
                del os.environ["SEPCONV_CACHE_DIR"]
            else:
                os.environ["SEPCONV_CACHE_DIR"] = before


def _run(args: argparse.Namespace) -> None:
    bench = _bench(args.dry_run)
    parts = list(_PARTS) if "all" in args.part else list(dict.fromkeys(args.part))
    seconds = args.seconds or (_ALL_SECONDS if "all" in args.part else _PART_SECONDS * len(parts))
    whole = sum(_PARTS[part][1] for part in parts)
    path = _result_path(args.out, bench) if args.out else None
    done = results.load(path) if path else {}
    # Shares of the copy's bandwidth are of the one measured in the same run.
    copy_case = ceilings.copy(bench)
    copy_time = copy_case.times.get("library")
    bandwidth = copy_case.useful_bytes / copy_time if copy_time and copy_case.useful_bytes else None
    for i, part in enumerate(parts):
        work, share = _PARTS[part]
        bench.cases = []
        start = time.monotonic()
        bench.start_part(seconds * share / whole)
        try:
            work(bench)
        except Exception as error:
            # A part that breaks costs its own figures, not those of the others.
            print(f"{part}: {type(error).__name__}: {error}", file=sys.stderr)
            bench.measure(part, f"the part stopped: {type(error).__name__}: {error}"[:300], [])
        took = time.monotonic() - start
        done[part] = results.section(describe(bench.device), bench.cases, bandwidth, took)
        Console().print(results.markdown({part: done[part]}), soft_wrap=True, markup=False)
        if path:
            results.write(path, done)
        if _device_lost(bench):
            _go_on_elsewhere(parts[i + 1 :], args, seconds / whole)
            return


def _device_lost(bench: Bench) -> bool:
    """Whether an error has left this process without its GPU."""
    if bench.device.type == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _go_on_elsewhere(parts: Sequence[str], args: argparse.Namespace, seconds: float) -> None:
    """Run the other parts in a process that has a GPU."""
    if not parts:
        return
    print("the GPU's context is lost: the other parts go on in a new process", file=sys.stderr)
    left = seconds * sum(_PARTS[part][1] for part in parts)
    command = [sys.executable, "-m", "sepconv.bench", "gpu", "--part", *parts]
    command += ["--seconds", f"{left:.0f}", *(["--out", str(args.out)] if args.out else [])]
    subprocess.run(command, check=False)


def _bench(dry: bool) -> Bench:
    if dry:
        if not can_run_kernels(torch.empty(0)):
            sys.exit("--dry-run: start Python with TRITON_INTERPRET=1")
        return Bench("cpu", dry=True)
    if not torch.cuda.is_available():
        sys.exit("no GPU: torch.cuda.is_available() is false (try --dry-run)")
    # The baselines at their best, and both sides by the same rules. Set by the older of torch's two
    # interfaces: parts of torch refuse to read what the newer one has set.
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True
    return Bench("cuda", dry=False)


def _result_path(folder: Path, bench: Bench) -> Path:
    name = "dry-run" if bench.dry else torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return folder / f"{slug}-{datetime.date.today():%Y-%m-%d}.json"
