"""`sepconv.fuse` on this machine, against eager and compiled forms, Inductor's freezing among them.

Every ratio comes from one run: the forms take turns, so that a slow spell of the machine hits all.
`chrt -r 1` before the command keeps others off the cores. `library/architecture@rank` is converted
at that rank first.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._inductor import config as inductor

import sepconv
from examples.benchmarks.bench import networks
from examples.benchmarks.bench.networks import machine
from sepconv._util import track, write_atomically
from sepconv.nn import fused as fused_modules
from sepconv.timing import take_turns

MODELS = (
    "torchvision/mobilenet_v2",
    "timm/mobilenetv1_100",
    "torchvision/efficientnet_b0",
    "torchvision/resnet18@1",
    "torchvision/resnet18@3",
)
OURS = ("fused", "fused, frozen")

Form = Callable[[], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m examples.benchmarks.bench fuse`."""
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help="library/architecture[@rank]"
    )
    parser.add_argument("--no-compile", action="store_true", help="eager forms only")
    add_sizes(parser)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Options that `measure_models` reads, but for the models."""
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=30, help="turns each form takes at batch 1")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def run(args: argparse.Namespace) -> None:
    """Measure and print the table."""
    measure_models(args, measure_model, _table)


def measure_models(
    args: argparse.Namespace,
    measure: Callable[[str, int, argparse.Namespace], dict[str, Any]],
    table: Callable[[list[dict[str, Any]], int], Table],
) -> None:
    """Measure each model at each batch, write the figures, print a table for each batch."""
    sepconv.keep_freed_memory()
    cases = [(name, batch) for batch in args.batches for name in args.models]
    rows = []
    for name, batch in track(cases, "measuring models"):
        rows.append(measure(name, batch, args))
        if args.json:
            figures = {"models": rows, "machine": machine()}
            write_atomically(args.json, json.dumps(figures, indent=2) + "\n")
    for batch in args.batches:
        Console().print(table([row for row in rows if row["batch"] == batch], args.resolution))


@torch.no_grad()
def measure_model(name: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a forward of each form takes, and how much the packed weights gain."""
    torch.manual_seed(0)
    model = build(name)
    x = torch.randn(batch, 3, args.resolution, args.resolution)
    fused = sepconv.fuse(model, x, measure=False)
    forms = _forms(model, fused, x, compiled=not args.no_compile)
    expected = model(x)
    with inductor.patch(freezing=True):  # what is frozen compiles at its first call
        for form in forms.values():
            form()
    times = take_turns(forms, max(args.rounds // (1 if batch == 1 else 2), 5))
    torch.compiler.reset()
    others = [t for form, t in times.items() if form not in OURS and form != "fused, not packed"]
    return {
        "model": name,
        "batch": batch,
        "ms": {form: t * 1e3 for form, t in times.items()},
        "ratio": min(others) / min(times[form] for form in OURS if form in times),
        "packing": times["fused, not packed"] / times["fused"],
        "error": float((expected - fused(x)).abs().max() / expected.abs().max()),
    }


def _forms(model: nn.Module, fused: nn.Module, x: Tensor, compiled: bool) -> dict[str, Form]:
    x_last = x.contiguous(memory_format=torch.channels_last)
    last: nn.Module = copy.deepcopy(model)
    last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def not_packed() -> Tensor:
        with patch.object(fused_modules, "usable", lambda *_: False):
            return fused(x)

    forms: dict[str, Form] = {
        "NCHW": lambda: model(x),
        "channels_last": lambda: last(x_last),
        "fused, not packed": not_packed,
        "fused": lambda: fused(x),
    }
    if compiled:
        frozen, frozen_last = torch.compile(copy.deepcopy(model)), torch.compile(last)
        frozen_fused = torch.compile(copy.deepcopy(fused))
        forms["frozen"] = lambda: frozen(x)
        forms["frozen, channels_last"] = lambda: frozen_last(x_last)
        forms["fused, frozen"] = lambda: frozen_fused(x)
    return forms


def build(name: str) -> nn.Module:
    """A model with random weights, in eval mode; `name` is its library, architecture and rank."""
    network, _, rank = name.partition("@")
    model = networks.build(network)
    if rank:
        model = sepconv.convert(model, rank=int(rank))
    return model.eval()


def _table(rows: list[dict[str, Any]], resolution: int) -> Table:
    """A column for each model."""
    threads = torch.get_num_threads()
    batch = rows[0]["batch"]
    table = Table(title=f"fuse, batch {batch}, {resolution} px, float32, {threads} threads, ms")
    table.add_column("form", overflow="fold")
    for row in rows:
        table.add_column(row["model"].partition("/")[2], justify="right", overflow="fold")
    for form in rows[0]["ms"]:
        table.add_row(form, *(f"{row['ms'][form]:.1f}" for row in rows))
    table.add_row("of the best other", *(f"{row['ratio']:.2f}x" for row in rows))
    table.add_row("packing", *(f"{row['packing']:.2f}x" for row in rows))
    table.add_row("error", *(f"{row['error']:.0e}" for row in rows))
    return table
