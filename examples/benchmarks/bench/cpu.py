"""Converted networks on a CPU at every rank, against the best that runs the dense one.

Each form runs in a process of its own, and in one rank's table they take turns, so that a slow
spell of the machine hits all. "Of dense" compares with the fastest of eager's two layouts and
Inductor's freezing; onnxruntime and OpenVINO are shown where they are installed. The floor is what
the multiply-adds take at the rate of large work or the operands at that of a copy,
whichever is more; both are measured here, the first as the better of a product and a convolution.
"""

import argparse
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from examples.benchmarks.bench.forms import Form, Spec
from examples.benchmarks.bench.networks import LIBRARIES, machine
from sepconv._util import track, write_atomically
from sepconv.timing import host_seconds

# Name, shape of the input.
CASES = (
    "torchvision/vgg16_bn:2x3x224x224",
    "torchvision/resnet18:4x3x224x224",
)
DENSE = ("eager", "channels_last", "Inductor frozen")
OURS = ("channels_last", "fuse", "backend frozen")
RIVALS = {"onnxruntime": ("onnxruntime", "onnxscript"), "OpenVINO": ("openvino", "onnxscript")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m examples.benchmarks.bench cpu`."""
    parser.add_argument(
        "--cases",
        nargs="+",
        type=_case,
        default=list(CASES),
        help="LIBRARY/NAME:SHAPE, as networks.py has them",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4], help="0: as it is")
    parser.add_argument("--rounds", type=int, default=5, help="turns each form takes")
    parser.add_argument("--no-compile", action="store_true", help="leave out Inductor")
    parser.add_argument("--no-rivals", action="store_true", help="leave out other runtimes")
    parser.add_argument("--bfloat16", action="store_true", help="every form in 16 bits as well")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def _case(word: str) -> str:
    """Checked before anything is measured."""
    if not re.fullmatch(rf"({'|'.join(LIBRARIES)})/\w+:[1-9]\d*(x[1-9]\d*)+", word):
        raise argparse.ArgumentTypeError(
            f"expected LIBRARY/NAME:SHAPE, as {CASES[0]}, of {', '.join(LIBRARIES)}; got {word!r}"
        )
    return word


def run(args: argparse.Namespace) -> None:
    """Measure and print the tables."""
    rates = measure_rates()
    rows: list[dict[str, Any]] = []
    for case in args.cases:
        for rank in args.ranks:
            row = measure(case, rank, rates, args)
            rows.append(row)
            Console().print(_table(row))
            if args.json:
                figures = {"cases": rows, "rates": rates, "machine": machine()}
                write_atomically(args.json, json.dumps(figures, indent=2) + "\n")


def measure_rates() -> dict[str, float]:
    """Multiply-adds a second of large work, bytes a second that a copy reads and writes."""
    a, b, c = (torch.randn(2048, 2048) for _ in range(3))
    source, target = (torch.zeros(2**26) for _ in range(2))
    images, weight = torch.randn(4, 256, 56, 56), torch.randn(256, 256, 3, 3)
    images, weight = (t.contiguous(memory_format=torch.channels_last) for t in (images, weight))
    product = host_seconds([lambda: torch.mm(a, b, out=c)], 1.0)
    convolution = host_seconds([lambda: torch.conv2d(images, weight)], 1.0)
    copy = host_seconds([lambda: target.copy_(source)], 1.0)
    rate = max(2048**3 / product, 4 * 54**2 * weight.numel() / convolution)
    return {"macs": rate, "bytes": 2 * 4 * 2**26 / copy}


def measure(
    case: str, rank: int, rates: dict[str, float], args: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds of each form of a network and of its conversion at one rank, in turns."""
    name, _, size = case.partition(":")
    shape = tuple(map(int, size.split("x")))
    dtypes = ("float32", "bfloat16") if args.bfloat16 else ("float32",)
    specs = _specs(name, shape, rank, dtypes, args)
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        forms: dict[str, Form] = {}
        for title, spec in track(specs.items(), f"{name}, rank {rank}", len(specs)):
            try:
                forms[title] = Form(spec)
            except RuntimeError as error:
                failed[title] = str(error)
            else:
                stack.callback(forms[title].close)
        turns: dict[str, list[float]] = {title: [] for title in forms}
        for _ in range(args.rounds):
            for title, form in forms.items():
                turns[title].append(form.seconds())
        made = {title: form.made for title, form in forms.items()}
    seconds = {title: median(times) for title, times in turns.items()}
    dense = min(seconds[f"dense, {how}"] for how in DENSE if f"dense, {how}" in seconds)
    counted = {title.partition(",")[0]: form for title, form in made.items()}
    before = counted["dense"].macs
    return {
        "model": name,
        "shape": shape,
        "rank": rank,
        "ms": {title: t * 1e3 for title, t in seconds.items()},
        "of dense": {title: dense / t for title, t in seconds.items()},
        "difference": {title: form.difference for title, form in made.items()},
        "fewer MACs": {word: before / form.macs for word, form in counted.items()},
        "floor ms": {
            word: 1e3 * max(form.macs / rates["macs"], form.bytes / rates["bytes"])
            for word, form in counted.items()
        },
        "failed": failed,
    }


def _specs(
    name: str, shape: tuple[int, ...], rank: int, dtypes: Sequence[str], args: argparse.Namespace
) -> dict[str, Spec]:
    """Every form by its title."""
    installed = [name for name, needs in RIVALS.items() if all(map(find_spec, needs))]
    rivals = [] if args.no_rivals else installed
    hows = {0: (*DENSE, *OURS[1:], *rivals)} if rank == 0 else {0: DENSE, rank: OURS}
    specs = {}
    for dtype in dtypes:
        for ranks, forms in hows.items():
            for how in (*forms, *(rivals if rank else ())):
                if (args.no_compile and how.endswith("frozen")) or (
                    how == "onnxruntime" and dtype != "float32"
                ):
                    continue
                title = f"rank {ranks}, {how}" if ranks else f"dense, {how}"
                title += "" if dtype == "float32" else f", {dtype}"
                specs[title] = Spec(name, shape, ranks, how, dtype)
    return specs


def _table(row: dict[str, Any]) -> Table:
    """A row for each form."""
    shape = " x ".join(map(str, row["shape"]))
    table = Table(title=f"{row['model']}, {shape}, {torch.get_num_threads()} threads")
    for column in ("form", "ms", "of dense", "fewer MACs", "floor ms", "difference"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for title, ms in row["ms"].items():
        word = title.partition(",")[0]
        table.add_row(
            title,
            f"{ms:.2f}",
            f"{row['of dense'][title]:.2f}x",
            f"{row['fewer MACs'][word]:.2f}x",
            f"{row['floor ms'][word]:.2f}",
            f"{row['difference'][title]:.0e}",
        )
    for title, why in row["failed"].items():
        table.add_row(title, why)
    return table
