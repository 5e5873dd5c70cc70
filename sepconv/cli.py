"""The command `sepconv`: tune a model's calls on this machine's GPU, export what was found."""

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from sepconv.ops import choice, choice_files
from sepconv.ops.backend import backend, can_run_kernels
from sepconv.tuning import Tuned, tune
from sepconv.tuning.candidates import MAX_CANDIDATES
from sepconv.tuning.race import OUT_OF_TIME

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sub-command that the command line names."""
    parser = argparse.ArgumentParser(prog="sepconv", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_tune(commands.add_parser("tune", help="find the fastest way to run a model's calls"))
    args = parser.parse_args(arguments)
    try:
        _tune(args)
    except ValueError as error:
        sys.exit(f"sepconv: {error}")


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Race the kernels' block sizes for every call that a model makes and keep the winners in "
        "the user's cache. After an interruption the same command goes on where it ended."
    )
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        default="sepconv.mobilenet:mobilenet_v1",
        help="MODULE:FUNCTION that makes the model, called without arguments (default %(default)s)",
    )
    add(
        "--input",
        type=_shape,
        nargs="+",
        default=[(32, 3, 224, 224)],
        metavar="NxCxHxW",
        help="one or more input shapes (default 32x3x224x224)",
    )
    add("--dtype", choices=_DTYPES, nargs="+", default=["bfloat16"])
    add("--backward", action="store_true", help="tune the backward pass too")
    add("--seconds", type=float, help="time limit for all of it")
    add("--retune", action="store_true", help="measure again what is in the cache")
    add(
        "--candidates",
        type=int,
        default=MAX_CANDIDATES,
        metavar="N",
        help="how many to try for each kind of call (default %(default)s)",
    )
    add("--export", type=Path, metavar="FOLDER", help="write all of this GPU's choices as a table")
    add("--export-arch", action="store_true", help="name the table by the architecture")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(map(int, text.split("x")))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected NxCxHxW, got {text!r}")
    return shape


def _tune(args: argparse.Namespace) -> None:
    console = Console()
    model = _make_model(args.model).to(args.device)
    cases = [(getattr(torch, name), shape) for name in args.dtype for shape in args.input]
    found: list[Tuned] = []
    for dtype, shape in cases:
        x = torch.randn(shape, device=args.device, dtype=dtype)
        seconds = None if args.seconds is None else args.seconds / len(cases)
        # A CPU can only interpret the kernels: good for trying this out, not for timing.
        interprets = x.is_cpu and can_run_kernels(x)
        with backend("triton" if interprets else "auto"):
            found += tune(
                model.to(dtype).train(args.backward),
                x,
                backward=args.backward,
                seconds=seconds,
                retune=args.retune,
                max_candidates=args.candidates,
            )
    console.print(_table(found))
    for line in _losses(found):
        console.print(line, markup=False, soft_wrap=True)
    if args.export:
        for line in _export(args):
            console.print(line, markup=False, soft_wrap=True)


def _make_model(name: str) -> nn.Module:
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"model: expected MODULE:FUNCTION, got {name!r}")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model: {error}") from error
    model = factory()
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected {name} to return a module, got {type(model).__name__}")
    return model


def _table(found: Sequence[Tuned]) -> Table:
    table = Table(title=f"tuned now: {len(found)} kinds of calls")
    for column in ("call", "choice", "us", "default us", "gain", "tried"):
        table.add_column(column, justify="left" if column in ("call", "choice") else "right")
    for tuned in found:
        won = choice_files.choice_json(tuned.key, tuned.choice)
        shown = won if isinstance(won, str) else " ".join(f"{k}={won[k]}" for k in won)
        table.add_row(
            tuned.key,
            shown,
            f"{tuned.seconds * 1e6:.1f}",
            f"{tuned.default_seconds * 1e6:.1f}",
            f"{tuned.default_seconds / tuned.seconds:.2f}x",
            f"{tuned.tried}/{tuned.candidates}",
        )
    return table


def _losses(found: Sequence[Tuned]) -> Iterator[str]:
    """What has no time, and what to do about it."""
    unfinished = sum(not tuned.finished for tuned in found)
    if unfinished:
        yield f"ran out of time: {unfinished} of {len(found)}; the same command goes on with them"
    reasons = Counter(
        (tuned.key.split("_float")[0].split("_bfloat")[0], lost.reason)
        for tuned in found
        for lost in tuned.lost
        if lost.reason != OUT_OF_TIME
    )
    for (op, reason), count in sorted(reasons.items()):
        yield f"{op}: {count} candidates left out: {reason}"


def _export(args: argparse.Namespace) -> Iterator[str]:
    """Write the table, and tell what is in it."""
    device = torch.device(args.device)
    index = -1 if device.type == "cpu" else (device.index or 0)
    where = choice.target(index)
    entries = choice_files.all_entries(where.gpu, where.triton)
    choices = choice_files.finished(entries)
    left_out = f"{len(entries) - len(choices)} left out, whose races are not finished"
    if not choices:
        raise ValueError(
            f"--export: nothing is tuned for {where.gpu}, Triton {where.triton}; {left_out}"
        )
    name = where.arch if args.export_arch else where.gpu
    yield f"wrote {choice_files.write_table(args.export, name, where.triton, choices)}"
    yield f"{len(choices)} choices; {left_out}"
