"""What a call of an op costs beside its arithmetic, against the `F.conv2d` calls it replaces.

On tensors so small that a call is mostly overhead. All contenders take turns in short batches, and
the fastest batch of each counts: on a shared machine noise only ever adds.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sepconv import ops
from sepconv._util import track, write_atomically

_CALLS = 10  # in one batch


class Overhead(NamedTuple):
    """Microseconds of one call: the op, its opaque registered form, and the calls it replaces."""

    op: str
    mode: str
    aten: float
    sepconv: float
    registered: float

    @property
    def added(self) -> float:
        """Microseconds that the op takes above the calls it replaces."""
        return self.sepconv - self.aten


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m examples.benchmarks.bench overhead`."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, default=500, help="turns each contender takes")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def run(args: argparse.Namespace) -> None:
    """Measure and print the table."""
    rows = measure(args.device, args.batches)
    Console().print(_table(rows, args.device))
    if args.json:
        figures = {
            "torch": torch.__version__,
            "device": args.device,
            "threads": torch.get_num_threads(),
            "microseconds": [{**row._asdict(), "added": row.added} for row in rows],
        }
        write_atomically(args.json, json.dumps(figures, indent=2) + "\n")


def measure(device: str = "cpu", batches: int = 500) -> list[Overhead]:
    """Time every op without gradients, with them recorded, and with the backward pass."""
    rows = []
    for op, calls_of in contenders(device).items():
        for mode in ("no_grad", "forward with grad", "forward + backward"):
            calls = [_in_mode(call, mode, device) for call in calls_of]
            rows.append(Overhead(op, mode, *_fastest(calls, batches, f"{op}, {mode}")))
    return rows


Call = Callable[[], Tensor]


def contenders(device: str) -> dict[str, tuple[Call, Call, Call]]:
    """Per op: the `F.conv2d` calls, ours, and the registered operator."""
    c = 8
    channels_last = torch.channels_last

    def leaf(*shape: int) -> Tensor:
        t = torch.empty(shape, device=device, memory_format=channels_last).normal_()
        return t.requires_grad_()

    x, weight_dw, weight_pw = leaf(1, c, 4, 4), leaf(c, 1, 3, 3), leaf(c, c, 1, 1)
    bias = torch.zeros(c, device=device, requires_grad=True)
    registered = torch.ops.sepconv
    geometry = ((1, 1), (1, 1, 1, 1), (1, 1))
    return {
        "depthwise_conv2d": (
            lambda: F.conv2d(x, weight_dw, bias, 1, 1, 1, c),
            lambda: ops.depthwise_conv2d(x, weight_dw, bias, 1, 1, 1),
            lambda: registered.depthwise_conv2d(x, weight_dw, bias, *geometry, None),
        ),
        "pointwise_conv2d": (
            lambda: F.conv2d(x, weight_pw, bias),
            lambda: ops.pointwise_conv2d(x, weight_pw, bias),
            lambda: registered.pointwise_conv2d(x, weight_pw, bias, None, None),
        ),
        "separable_conv2d": (
            lambda: F.conv2d(F.conv2d(x, weight_dw, None, 1, 1, 1, c), weight_pw, bias),
            lambda: ops.separable_conv2d(x, weight_dw, weight_pw, None, bias, 1, 1, 1),
            lambda: registered.separable_conv2d(
                x, weight_dw, weight_pw, None, bias, *geometry, None, None, None
            ),
        ),
    }


def _in_mode(call: Call, mode: str, device: str) -> Callable[[], None]:
    """The same call without gradients, with its graph recorded, or with its backward pass."""
    synchronize: Callable[[], Any] = torch.cuda.synchronize if device != "cpu" else lambda: None

    def without_grad() -> None:
        with torch.no_grad():
            for _ in range(_CALLS):
                call()
        synchronize()

    def with_grad() -> None:
        for _ in range(_CALLS):
            call()
        synchronize()

    def with_backward() -> None:
        for _ in range(_CALLS):
            y = call()
            y.backward(torch.ones_like(y))
        synchronize()

    modes = {
        "no_grad": without_grad,
        "forward with grad": with_grad,
        "forward + backward": with_backward,
    }
    return modes[mode]


def _fastest(batches_of: list[Callable[[], None]], rounds: int, description: str) -> list[float]:
    """Microseconds per call of each contender's fastest batch."""
    best = [float("inf")] * len(batches_of)
    for _ in track(range(rounds), description):
        for i, batch in enumerate(batches_of):
            start = time.perf_counter()
            batch()
            best[i] = min(best[i], time.perf_counter() - start)
    return [seconds / _CALLS * 1e6 for seconds in best]


def _table(rows: list[Overhead], device: str) -> Table:
    table = Table(
        title=f"microseconds per call, {device}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    for name in ("op", "mode"):
        table.add_column(name)
    for name in ("F.conv2d", "sepconv.ops", "added", "torch.ops.sepconv"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = (row.aten, row.sepconv, row.added, row.registered)
        table.add_row(row.op, row.mode, *(f"{figure:.1f}" for figure in figures))
    return table
