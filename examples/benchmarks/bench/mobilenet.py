"""MobileNetV1 on a CPU against timm's `mobilenetv1_100` in each of its forms, same weights."""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from examples.benchmarks.bench import torchvision_shim
from examples.benchmarks.bench.cpu import channels_last, machine
from sepconv import fuse, keep_freed_memory, mobilenet
from sepconv._util import track, write_atomically
from sepconv.timing import take_turns

OURS = "sepconv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m examples.benchmarks.bench mobilenet`."""
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=30, help="turns each form takes")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def run(args: argparse.Namespace) -> None:
    """Measure and print the table."""
    rows = [
        measure(batch, args.resolution, args.rounds, compiled=not args.no_compile)
        for batch in track(args.batches, "measuring batches")
    ]
    Console().print(_table(rows, args.resolution))
    if args.json:
        figures = {"batches": rows, "machine": machine()}
        write_atomically(args.json, json.dumps(figures, indent=2) + "\n")


@torch.no_grad()
def measure(batch: int, resolution: int, rounds: int, *, compiled: bool) -> dict[str, Any]:
    """Milliseconds a forward of each form takes, the ratio, and the difference of the logits."""
    keep_freed_memory()
    torch.manual_seed(0)
    theirs = build_timm()
    theirs_last = channels_last(copy.deepcopy(theirs))
    x = torch.randn(batch, 3, resolution, resolution)
    ours = fuse(mobilenet.load(theirs.state_dict()), x, measure=False)
    x_last = x.contiguous(memory_format=torch.channels_last)
    forms = {
        "timm NCHW": lambda: theirs(x),
        "timm channels_last": lambda: theirs_last(x_last),
        OURS: lambda: ours(x),
    }
    if compiled:
        fast, fast_last = torch.compile(theirs), torch.compile(theirs_last)
        forms["timm NCHW compiled"] = lambda: fast(x)
        forms["timm channels_last compiled"] = lambda: fast_last(x_last)
    times = take_turns(forms, rounds)
    torch.compiler.reset()
    best = min(seconds for form, seconds in times.items() if form != OURS)
    want = theirs(x)
    return {
        "batch": batch,
        "ms": {form: seconds * 1e3 for form, seconds in times.items()},
        "speed-up": best / times[OURS],
        "difference": ((ours(x) - want).abs().max() / want.abs().max()).item(),
    }


def build_timm() -> nn.Module:
    """Timm's network with random weights, in eval mode."""
    torchvision_shim.install()
    import timm

    model: nn.Module = timm.create_model("mobilenetv1_100")
    return model.eval()


def _table(rows: list[dict[str, Any]], resolution: int) -> Table:
    threads = torch.get_num_threads()
    table = Table(title=f"MobileNetV1 1.0, {resolution} px, float32, {threads} threads, ms")
    table.add_column("form")
    for row in rows:
        table.add_column(f"batch {row['batch']}", justify="right")
    for form in rows[0]["ms"]:
        table.add_row(form, *(f"{row['ms'][form]:.2f}" for row in rows))
    table.add_row("speed-up over timm's best", *(f"{row['speed-up']:.2f}x" for row in rows))
    table.add_row("difference of the logits", *(f"{row['difference']:.1e}" for row in rows))
    return table
