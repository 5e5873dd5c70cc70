"""The arguments of every command. Without torch, so that `--help` answers at once."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

from sepconv.cli import arguments


def _convert(parser: argparse.ArgumentParser) -> None:
    _source(parser)
    add = parser.add_argument
    add(
        "-o",
        "--output",
        type=arguments.ending(".safetensors"),
        metavar="OUT.safetensors",
        help="where the result goes; needed unless with --dry-run",
    )
    budgets = parser.add_argument_group("what to keep (default: rank 1)")
    only = budgets.add_mutually_exclusive_group()
    only.add_argument(
        "--rank",
        type=arguments.rank,
        action="append",
        metavar="[PATTERN=]RANK",
        help="depthwise filters per input channel: a number, or full (exact); with a PATTERN of "
        "the layers that it is for, as often as you like (PATTERN=none leaves them)",
    )
    for name, of in (
        ("macs", "the whole model's multiply-adds"),
        ("params", "its parameters"),
        ("latency", "its time on this device"),
    ):
        only.add_argument(
            f"--{name}", type=arguments.fraction, metavar="F", help=f"at most this fraction of {of}"
        )
    only.add_argument(
        "--error",
        type=arguments.fraction,
        metavar="F",
        help="at most this squared error of the outputs, over their variance",
    )
    _forms(budgets)
    _data(parser, "--calibration", required=False)
    _effort(parser)
    _exports(parser)
    add("--report", type=arguments.ending(".html"), metavar="OUT.html", help="a page to look at")
    add("--dry-run", action="store_true", help="plan and report only; write nothing")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="that sepconv convert or sepconv.save wrote")
    parser.add_argument(
        "--html", type=arguments.ending(".html"), metavar="OUT.html", help="a page to look at"
    )


def _cost(parser: argparse.ArgumentParser) -> None:
    _source(parser)
    parser.add_argument("--by", choices=("layer", "kind"), default="kind", help="rows of the table")


def _fuse(parser: argparse.ArgumentParser) -> None:
    _source(parser)
    _exports(parser)


def _sweep(parser: argparse.ArgumentParser) -> None:
    _source(parser)
    parser.add_argument(
        "--budgets",
        type=arguments.fractions,
        metavar="F,F,...",
        help="fractions to try, such as 0.3,0.5,0.7",
    )
    parser.add_argument(
        "--evaluate",
        metavar="MODULE:FUNCTION",
        help="a function of yours: the score of a model, higher is better",
    )
    parser.add_argument("--plot", type=arguments.ending(".png", ".svg"), metavar="OUT.png")
    parser.add_argument(
        "--keep",
        metavar="FOLDER",
        help="where the models are kept; a second run goes on from there",
    )
    parser.add_argument(
        "--cost",
        choices=("macs", "params", "latency"),
        default="macs",
        help="what the fractions are of (default %(default)s)",
    )
    _data(parser, "--calibration", required=True)
    _effort(parser)


def _distill(parser: argparse.ArgumentParser) -> None:
    _source(parser)
    add = parser.add_argument
    add(
        "--student",
        required=True,
        metavar="FILE",
        help="the converted model that sepconv convert wrote",
    )
    add(
        "-o",
        "--output",
        required=True,
        type=arguments.ending(".safetensors"),
        metavar="OUT.safetensors",
    )
    add("--epochs", type=arguments.positive, default=5, metavar="N", help="default %(default)s")
    add(
        "--learning-rate",
        type=arguments.above_zero,
        metavar="X",
        help="at the start (default 1e-3; 1e-4 for a calibrated student)",
    )
    add("--loss", choices=("kl", "error"), help="kl for classifiers, error for anything else")
    add("--log", metavar="FILE.csv", help="a row for each epoch")
    add("--checkpoint", metavar="FILE", help="kept after each epoch; the same command goes on")
    _data(parser, "--data", required=True)


def _tune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Race the kernels' block sizes for every call that a model makes and keep the winners in "
        "the user's cache. After an interruption the same command goes on where it ended."
    )
    add = parser.add_argument
    add(
        "source",
        nargs="?",
        default="sepconv.mobilenet:mobilenet_v1",
        metavar="SOURCE",
        help="see below (default %(default)s)",
    )
    _original(parser)
    add(
        "--input",
        type=arguments.image_shape,
        nargs="+",
        default=[(32, 3, 224, 224)],
        metavar="NxCxHxW",
        help="one or more input shapes (default 32x3x224x224)",
    )
    dtypes = ("bfloat16", "float16", "float32", "float64")
    add("--dtype", choices=dtypes, nargs="+", default=["bfloat16"], help="default bfloat16")
    add("--backward", action="store_true", help="tune the backward pass too")
    add("--seconds", type=float, help="time limit for all of it")
    add("--retune", action="store_true", help="measure again what is in the cache")
    add(
        "--candidates",
        type=int,
        default=8,
        metavar="N",
        help="how many to try for each kind of call (default %(default)s)",
    )
    add("--export", metavar="FOLDER", help="write all of this GPU's choices as a table")
    add("--export-arch", action="store_true", help="name the table by the architecture")
    _device(parser)


def _doctor(parser: argparse.ArgumentParser) -> None:
    _device(parser)


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="FOLDER", default=".", help="where the picture goes (default: here)"
    )


def _source(parser: argparse.ArgumentParser) -> None:
    """A model, and one input of it."""
    parser.add_argument("source", metavar="SOURCE", help="see below")
    _original(parser)
    parser.add_argument(
        "--weights", metavar="FILE", help="a state_dict to load: .safetensors, .pt, .pth"
    )
    parser.add_argument(
        "--untrained",
        action="store_true",
        help="with random weights, where timm or torchvision would fetch trained ones",
    )
    parser.add_argument(
        "--input",
        type=arguments.shape,
        metavar="NxCxHxW",
        help="shape of an input, as 1x3x224x224 (default: the model's own)",
    )
    _device(parser)


def _original(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        dest="original",
        metavar="SOURCE",
        help="of a FILE.safetensors: the model it was made from, where the file does not tell or "
        "that may run code (MODULE:FUNCTION, FILE.pt2)",
    )


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")


def _forms(group: argparse._ArgumentGroup) -> None:
    """The choice of layers and forms, by the names that `sepconv.convert` has for it."""
    for name in ("include", "exclude"):
        group.add_argument(
            f"--{name}", action="append", metavar="PATTERN", help=f"of layers to {name}"
        )
    for name, told in (
        ("first-conv", "convert the network's first convolution too"),
        ("pointwise", "split 1x1 convolutions in two"),
        ("bottleneck", "let a budget choose forms with 1x1 convolutions around the filters"),
    ):
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=told)
    group.add_argument(
        "--only-if-faster",
        action="store_true",
        help="leave layers that do not measure faster on this device",
    )


def _data(parser: argparse.ArgumentParser, flag: str, required: bool) -> None:
    """Inputs without labels."""
    group = parser.add_argument_group("inputs without labels")
    group.add_argument(flag, dest="data", required=required, metavar="DATA", help="see below")
    group.add_argument(
        "--samples",
        type=arguments.positive,
        metavar="N",
        help="at most so many images of a folder"
        + (" (default 256)" if flag == "--calibration" else " (default: all)"),
    )
    group.add_argument(
        "--batch-size", type=arguments.positive, default=32, metavar="N", help="default %(default)s"
    )
    group.add_argument("--seed", type=int, default=0, help="of the choice (default %(default)s)")
    for name in ("mean", "std"):
        group.add_argument(
            f"--{name}",
            type=arguments.channels,
            metavar="A,B,C",
            help=f"{name} of each channel in 0..1, where the model does not state its own",
        )


def _effort(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to calibrate")
    group.add_argument(
        "--effort",
        type=arguments.effort,
        default="default",
        help="fast, default, thorough, or a number of seconds",
    )


def _exports(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("other formats; each is loaded again and compared")
    group.add_argument(
        "--onnx", type=arguments.ending(".onnx"), metavar="OUT.onnx", help="for ONNX runtimes"
    )
    group.add_argument(
        "--pt2", type=arguments.ending(".pt2"), metavar="OUT.pt2", help="for torch.export.load"
    )


class Command(NamedTuple):
    """A command: `sepconv.cli.<its name>` runs it.

    Attributes:
        told: What it does, in a line.
        add: Gives a parser its arguments.
        source: Whether it takes a SOURCE.
        data: Whether it takes DATA.
    """

    told: str
    add: Callable[[argparse.ArgumentParser], None]
    source: bool = False
    data: bool = False


COMMANDS = {
    "convert": Command(
        "rewrite a trained model's convolutions to a rank or a budget, and save it",
        _convert,
        source=True,
        data=True,
    ),
    "report": Command("what was done to a saved model, layer by layer", _report),
    "cost": Command(
        "multiply-adds, parameters and bytes of a model, by layer or by kind", _cost, source=True
    ),
    "fuse": Command(
        "lower a model for inference; say what was fused, compare and time both forms",
        _fuse,
        source=True,
    ),
    "sweep": Command(
        "convert at several budgets, and plot what each costs and keeps",
        _sweep,
        source=True,
        data=True,
    ),
    "distill": Command(
        "train a converted model to answer as the original does, without labels",
        _distill,
        source=True,
        data=True,
    ),
    "tune": Command(
        "find the fastest kernels for a model's calls on this machine's GPU", _tune, source=True
    ),
    "doctor": Command(
        "check this machine: versions, device, whether the kernels run and are right", _doctor
    ),
    "demo": Command("train a small network, convert it at several budgets, compare", _demo),
}
