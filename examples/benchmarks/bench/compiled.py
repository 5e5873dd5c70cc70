"""`torch.compile(backend="sepconv")` on this machine, against eager, `fuse` and Inductor.

Every ratio comes from one run: the forms take turns, so that a slow spell of the machine hits all.
`chrt -r 1` before the command keeps others off the cores. Two forms show what the backend does not
do on a CPU, and why: convolutions rewritten to our ops, and BatchNorms folded in each call.
`library/architecture@rank` is converted at that rank first.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, fx
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx

import sepconv
from examples.benchmarks.bench.fuse import add_sizes, build, measure_models
from sepconv.fusion.backend import compile_graph
from sepconv.fusion.captured import lower
from sepconv.timing import take_turns

MODELS = (
    "torchvision/mobilenet_v2",
    "timm/mobilenetv1_100",
    "torchvision/resnet18@1",
    "torchvision/resnet18@3",
)
FREEZING = {"freezing": True}

Form = Callable[[], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m examples.benchmarks.bench compiled`."""
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help="library/architecture[@rank]"
    )
    add_sizes(parser)


def run(args: argparse.Namespace) -> None:
    """Measure and print the tables."""
    measure_models(args, measure_model, _table)


@torch.no_grad()
def measure_model(name: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a forward of each form takes, and how far its result is from eager's."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = build(name)
    x = torch.randn(batch, 3, args.resolution, args.resolution)
    fused = sepconv.fuse(model, x, measure=False)

    def compiled(backend: Any, options: Any = None) -> Form:
        fast = torch.compile(model, backend=backend, options=options)
        return lambda: fast(x)

    forms: dict[str, Form] = {
        "eager": lambda: model(x),
        "fuse": lambda: fused(x),
        "Inductor": compiled("inductor"),
        "Inductor, freezing": compiled("inductor", FREEZING),
        "backend": compiled(compile_graph),
        "backend, freezing": compiled(compile_graph, FREEZING),
        "our ops": compiled(_with_our_ops),
        "folded in each call": compiled(_folded_in_each_call),
    }
    errors = {}
    expected = model(x)
    for form, call in forms.items():
        # Inductor alone freezes only what Dynamo captures with the option set for the process.
        with inductor.patch(freezing=form == "Inductor, freezing"):
            errors[form] = float((call() - expected).abs().max() / expected.abs().max())
    times = take_turns(forms, max(args.rounds // (1 if batch == 1 else 2), 5))
    return {
        "model": name,
        "batch": batch,
        "ms": {form: t * 1e3 for form, t in times.items()},
        "error": errors,
    }


def _with_our_ops(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """What the backend does on a GPU."""
    lower(graph, frozen=False, kernels=True)
    return compile_fx(graph, list(inputs))


def _folded_in_each_call(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    lower(graph, frozen=True, kernels=False)
    return compile_fx(graph, list(inputs))


def _table(rows: list[dict[str, Any]], resolution: int) -> Table:
    """A column for each model."""
    threads = torch.get_num_threads()
    batch = rows[0]["batch"]
    title = f"compiled, batch {batch}, {resolution} px, float32, {threads} threads, ms"
    table = Table(title=title)
    table.add_column("form", overflow="fold")
    for row in rows:
        table.add_column(row["model"].partition("/")[2], justify="right", overflow="fold")
    for form in rows[0]["ms"]:
        table.add_row(form, *(f"{row['ms'][form]:.1f}" for row in rows))
    table.add_row("largest error", *(f"{max(row['error'].values()):.0e}" for row in rows))
    return table
