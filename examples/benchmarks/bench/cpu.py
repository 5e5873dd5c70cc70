"""Rank-1 conversion on a CPU, against the best dense form and against hand-written pairs.

Every ratio comes from one run: the forms take turns, so that a slow spell of the machine hits all.
"""

import argparse
import copy
import gc
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import sepconv
from examples.benchmarks.bench import torchvision_shim
from sepconv._util import track, write_atomically
from sepconv.timing import take_turns

MODELS = ("vgg16_bn", "resnet50", "resnet18")
CONVERSIONS = (("resnet50", 1), ("vgg16_bn", 4))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m examples.benchmarks.bench cpu`."""
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="torchvision models")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=12, help="turns each form takes")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def run(args: argparse.Namespace) -> None:
    """Measure and print the tables."""
    sepconv.keep_freed_memory()
    console = Console()
    rows = [
        measure_model(name, args.rank, args.batch, args.resolution, args.rounds)
        for name in track(args.models, "measuring models")
    ]
    conversions = [measure_conversion(name, rank) for name, rank in CONVERSIONS]
    console.print(_model_table(rows, args))
    console.print(_conversion_table(conversions))
    if args.json:
        figures = {"models": rows, "conversions": conversions, "machine": machine()}
        write_atomically(args.json, json.dumps(figures, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


@torch.no_grad()
def measure_model(name: str, rank: int, batch: int, resolution: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a forward of each form of a torchvision model takes, and the ratios.

    `fewer MACs` is the speed-up if every multiply-add took as long as in the dense model.
    """
    torch.manual_seed(0)
    dense = build(name)
    x = torch.randn(batch, 3, resolution, resolution)
    x_last = x.contiguous(memory_format=torch.channels_last)
    dense_last = channels_last(copy.deepcopy(dense))
    pairs = channels_last(hand_written(dense, rank))
    converted = sepconv.convert(dense, x, rank=rank)
    fused = sepconv.fuse(converted, x)
    times = take_turns(
        {
            "dense NCHW": lambda: dense(x),
            "dense channels_last": lambda: dense_last(x_last),
            "hand-written pairs": lambda: pairs(x_last),
            "converted": lambda: converted(x),
            "and fused": lambda: fused(x),
        },
        rounds,
    )
    best = min(times["dense NCHW"], times["dense channels_last"])
    report = sepconv.report(converted)
    return {
        "model": name,
        "ms": {form: t * 1e3 for form, t in times.items()},
        "speed-up": best / times["converted"],
        "fused": best / times["and fused"],
        "of hand-written": times["converted"] / times["hand-written pairs"],
        "fewer MACs": report.macs_before / report.macs_after,
    }


def measure_conversion(name: str, rank: int) -> dict[str, Any]:
    """Seconds and peak memory of a conversion, in a process of its own."""
    code = f"from examples.benchmarks.bench import cpu; cpu.print_conversion({name!r}, {rank})"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def print_conversion(name: str, rank: int) -> None:
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
    figures = {"model": name, "rank": rank, "seconds": seconds, "memory": peak / size}
    print(json.dumps(figures))


def build(name: str) -> nn.Module:
    """A torchvision model with random weights, in eval mode."""
    torchvision_shim.install()
    import torchvision

    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **extra).eval()


def channels_last(model: nn.Module) -> nn.Module:
    """The model with its 4-D parameters in channels_last."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def hand_written(dense: nn.Module, rank: int) -> nn.Module:
    """What a user would write: a pair of `nn.Conv2d` for each convolution that is converted."""
    model = copy.deepcopy(dense)
    layers = sepconv.convert(dense, rank=rank, dryrun=True).converted
    for name in (layer.name for layer in layers):
        conv: Any = model.get_submodule(name)
        channels = conv.in_channels * rank
        settings = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.in_channels)
        depthwise = nn.Conv2d(conv.in_channels, channels, *settings, bias=False)
        pointwise = nn.Conv2d(channels, conv.out_channels, 1, bias=conv.bias is not None)
        model.set_submodule(name, nn.Sequential(depthwise, pointwise))
    return model.eval()


def _peak_bytes() -> int:
    """Largest resident size so far; the kernel's own mark, since rusage is inherited on exec."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _model_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    size = f"batch {args.batch}, {args.resolution} px, float32"
    table = Table(
        title=f"rank {args.rank}, {size}, {torch.get_num_threads()} threads, ms a forward"
    )
    forms = list(rows[0]["ms"])
    ratios = ("speed-up", "fused", "of hand-written", "fewer MACs")
    for column in ("model", *forms, *ratios):
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        shown = [f"{row['ms'][form]:.1f}" for form in forms]
        table.add_row(row["model"], *shown, *(f"{row[ratio]:.2f}x" for ratio in ratios))
    return table


def _conversion_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="conversion itself")
    for column in ("model", "rank", "seconds", "peak memory, models"):
        table.add_column(column, justify="right")
    for row in rows:
        memory = f"{row['memory']:.2f}"
        table.add_row(row["model"], str(row["rank"]), f"{row['seconds']:.2f}", memory)
    return table
