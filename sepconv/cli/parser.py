"""Reads the command line. Without torch, so that `--help` answers at once."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from sepconv.cli.options import COMMANDS

_SOURCES = """
SOURCE is a model:
  timm:NAME            a model of timm with its trained weights, as timm:resnet18
  torchvision:NAME     a model of torchvision, likewise; NAME,num_classes=10: with an argument
  hf:FOLDER            a model of transformers in a local folder
  MODULE:FUNCTION      what a function of yours returns, called without arguments
  FILE.pt2             a program that torch.export saved
  FILE.onnx            an ONNX file, read by onnx2torch
  FILE.safetensors     what `sepconv convert` or sepconv.save wrote
"""

_OVERVIEW = f"""
{_SOURCES}
first steps:
  sepconv doctor
  sepconv convert timm:resnet18 -o small.safetensors --macs 0.5 --calibration photos/ \\
      --report small.html --onnx small.onnx
  sepconv report small.safetensors
  sepconv COMMAND --help

exit codes: 0 good; 1 a check failed (a budget out of reach, a function lost, answers that differ,
a fault that doctor found); 2 wrong input.
"""

_DATA = """
DATA is some hundred inputs, without labels:
  FOLDER               of images (jpg, png, webp, bmp), also in folders inside; prepared as timm,
                       torchvision or transformers say for the model, or by --mean and --std
  FILE.npz             one array, or the array x: numbers as they are, [N, ...]; or images as
                       bytes, [N, H, W, 3], prepared like those in a folder
  MODULE:FUNCTION      a function of yours that returns batches
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` tells more\n")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *others: Any) -> None:
        version = import_module("sepconv._version").__version__
        print(f"sepconv {version}")
        parser.exit()


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace; leaves with exit code 2 where it is wrong.

    Args:
        words: After the program's name; those of the process where it is None.
    """
    words = sys.argv[1:] if words is None else list(words)
    parser, commands = _built()
    if words and words[0] not in (*COMMANDS, "-h", "--help", "--version"):
        parser.error(f"expected a command, got {words[0]!r}{_closest(words[0], [*COMMANDS])}")
    options, rest = parser.parse_known_args(words)
    if rest:
        command = commands[options.command]
        known = re.findall(r"--[a-z0-9-]+", command.format_help())
        wrong = next((word for word in rest if word.startswith("-")), rest[0])
        command.error(f"unknown argument {wrong!r}{_closest(wrong, known)}")
    return options


def _closest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f", did you mean {near[0]!r}?" if near else ""


def _built() -> tuple[_Parser, dict[str, _Parser]]:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="sepconv",
        description="Turn the convolutions of a trained network into depthwise separable ones.",
        epilog=_OVERVIEW,
        formatter_class=raw,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    group = parser.add_subparsers(
        dest="command", required=True, title="commands", metavar="COMMAND"
    )
    commands: dict[str, _Parser] = {}
    for name, command in COMMANDS.items():
        commands[name] = group.add_parser(
            name,
            help=command.told,
            description=f"{command.told[0].upper()}{command.told[1:]}.",
            epilog=_SOURCES * command.source + _DATA * command.data,
            formatter_class=raw,
            allow_abbrev=False,
        )
        command.add(commands[name])
        commands[name].add_argument(
            "--json", action="store_true", help="print one JSON document instead"
        )
    return parser, commands
