"""`sepconv.fuse` on this machine, against eager in both memory formats and `torch.compile`.

Every ratio comes from one run: the forms take turns, so that a slow spell of the machine hits all.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sepconv
from sepconv._util import track, write_atomically
from sepconv.bench import torchvision_shim
from sepconv.bench.cpu import machine
from sepconv.timing import take_turns

MODELS = (
    "torchvision/mobilenet_v2",
    "torchvision/efficientnet_b0",
    "timm/mobilenetv1_100",
    "torchvision/convnext_tiny",
    "timm/legacy_xception",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m sepconv.bench fuse`."""
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="library/architecture")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15, help="turns each form takes")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def run(args: argparse.Namespace) -> None:
    """Measure and print the table."""
    rows = [
        measure_model(name, args.batch, args.resolution, args.rounds)
        for name in track(args.models, "measuring models")
    ]
    Console().print(_table(rows, args))
    if args.json:
        figures = {"models": rows, "machine": machine()}
        write_atomically(args.json, json.dumps(figures, indent=2) + "\n")


@torch.no_grad()
def measure_model(name: str, batch: int, resolution: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a forward of each form takes, and the fused form's ratio to the best other."""
    torch.manual_seed(0)
    model = build(name)
    x = torch.randn(batch, 3, resolution, resolution)
    x_last = x.contiguous(memory_format=torch.channels_last)
    last: nn.Module = copy.deepcopy(model)
    last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    compiled = torch.compile(copy.deepcopy(model))
    fused = sepconv.fuse(model, x, measure=False)
    forms: dict[str, Callable[[], Tensor]] = {
        "eager NCHW": lambda: model(x),
        "eager channels_last": lambda: last(x_last),
        "torch.compile": lambda: compiled(x),
        "fused": lambda: fused(x),
    }
    times = take_turns(forms, rounds)
    expected, got = model(x), fused(x)
    others = {form: t for form, t in times.items() if form != "fused"}
    return {
        "model": name,
        "ms": {form: t * 1e3 for form, t in times.items()},
        "ratio": min(others.values()) / times["fused"],
        "error": float((expected - got).abs().max() / expected.abs().max()),
    }


def build(name: str) -> nn.Module:
    """A model with random weights, in eval mode; `name` is its library and architecture."""
    torchvision_shim.install()
    library, _, architecture = name.partition("/")
    if library == "timm":
        import timm

        return timm.create_model(architecture, pretrained=False).eval()
    import torchvision

    return torchvision.models.get_model(architecture, weights=None).eval()


def _table(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    size = f"batch {args.batch}, {args.resolution} px, float32"
    table = Table(title=f"sepconv.fuse, {size}, {torch.get_num_threads()} threads, ms a forward")
    for column in ("model", *rows[0]["ms"], "ratio to the best", "error"):
        table.add_column(column, justify="right")
    for row in rows:
        shown = [f"{t:.1f}" for t in row["ms"].values()]
        table.add_row(row["model"], *shown, f"{row['ratio']:.2f}x", f"{row['error']:.0e}")
    return table
