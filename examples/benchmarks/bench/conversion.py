"""What a conversion itself takes: seconds and peak memory, each in a process of its own."""

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

import sepconv
from examples.benchmarks.bench.networks import build

CONVERSIONS = (("torchvision/resnet50", 1), ("torchvision/vgg16_bn", 4))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`python -m examples.benchmarks.bench conversion` has no options."""


def run(args: argparse.Namespace) -> None:
    """Measure and print the table."""
    table = Table(title="conversion by the weights, one rank")
    for column in ("model", "rank", "seconds", "peak memory, models"):
        table.add_column(column, justify="right")
    for name, rank in CONVERSIONS:
        row = measure(name, rank)
        table.add_row(name, str(rank), f"{row['seconds']:.2f}", f"{row['memory']:.2f}")
    Console().print(table)


def measure(name: str, rank: int) -> dict[str, Any]:
    """Seconds and peak memory of a conversion, in a process of its own."""
    module = "examples.benchmarks.bench.conversion"
    code = f"from {module} import convert; convert({name!r}, {rank})"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def convert(name: str, rank: int) -> None:
    """Convert once and print what it took as a line of JSON."""
    dense = build(name)
    size = sum(p.numel() * p.element_size() for p in dense.parameters())
    # The first use of an operator loads libraries; they are no part of the model's memory.
    sepconv.convert(nn.Sequential(nn.Conv2d(8, 8, 3)), rank=rank)
    gc.collect()
    before = _peak_bytes()
    start = time.perf_counter()
    sepconv.convert(dense, rank=rank)
    seconds = time.perf_counter() - start
    peak = size + _peak_bytes() - before
    print(json.dumps({"seconds": seconds, "memory": peak / size}))


def _peak_bytes() -> int:
    """Largest resident size so far; the kernel's own mark, since rusage is inherited on exec."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
