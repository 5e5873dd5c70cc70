"""`main`: read the command line, run the command, print its result, leave with its exit code."""

import contextlib
import json
import math
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from sepconv.cli.parser import parsed
from sepconv.cli.result import Result

_PACKAGE = Path(__file__).resolve().parents[1]
GOOD, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that the command line names.

    Args:
        words: After the program's name; those of the process where it is None.

    Returns:
        The exit code: 0 good, 1 a check failed, 2 wrong input.

    Raises:
        SystemExit: `--help`, `--version`, or a command line that cannot be read.
    """
    options = parsed(words)
    remarks: list[str] = []
    try:
        with _remarks(options, remarks), _stdout_for_the_result(options):
            # By name, so that no command imports what another one needs.
            result = import_module(f"sepconv.cli.{options.command}").run(options)
    except (ValueError, OSError) as error:
        message = _line(error)
        if options.json:
            _print_json(options, {"error": message}, ok=False)
        print(f"sepconv {options.command}: {message}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print(f"sepconv {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    _show(options, result, remarks)
    for fault in result.faults:
        if fault in remarks:  # and so is printed already
            continue
        print(f"sepconv {options.command}: {fault}", file=sys.stderr)
    return FAILED if result.faults else GOOD


@contextlib.contextmanager
def _remarks(options: Namespace, kept: list[str]) -> Iterator[None]:
    """Warnings as lines on standard error, and in `kept`."""

    def show(message: Warning | str, category: type[Warning], filename: str, *others: Any) -> None:
        ours = Path(filename).is_relative_to(_PACKAGE)
        if not ours and "site-packages" in filename:  # others speak to who wrote the code
            return
        told = str(message).removeprefix(f"{options.command}: ")
        kept.append(told)
        print(f"sepconv {options.command}: {told}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        # What other packages say of their own future is not for who runs a command.
        for kind in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = show  # type: ignore[assignment]  # put back by catch_warnings
        yield


@contextlib.contextmanager
def _stdout_for_the_result(options: Namespace) -> Iterator[None]:
    """With `--json`, what anybody prints meanwhile goes to standard error."""
    if not options.json:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _show(options: Namespace, result: Result, remarks: Sequence[str]) -> None:
    if options.json:
        told = {**result.data, "faults": result.faults, "warnings": list(remarks)}
        _print_json(options, told, ok=not result.faults)
        return
    console = import_module("rich.console").Console()
    for item in result.shown:
        if isinstance(item, str):
            console.print(item, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(item)


def _print_json(options: Namespace, content: dict[str, Any], ok: bool) -> None:
    told = {"command": options.command, "ok": ok, **content}
    print(json.dumps(_plain(told), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """What JSON can hold: no infinite numbers, and paths as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
