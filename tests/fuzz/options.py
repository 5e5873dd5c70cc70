"""Checks of the fuzz's options on the command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


def share(text: str) -> tuple[int, int]:
    """I and N of `I/N`."""
    index, _, shares = text.partition("/")
    if not (index.isdecimal() and shares.isdecimal() and 1 <= int(index) <= int(shares)):
        raise argparse.ArgumentTypeError(f"expected I/N, such as 2/4, got {text!r}")
    return int(index), int(shares)


def share_of(items: Sequence[Item], share: tuple[int, int]) -> list[Item]:
    """Every N-th item from the I-th on."""
    index, shares = share
    return list(items[index - 1 :: shares])


def check_options(
    full: bool, examples: int | None, seconds: float | None, log: Path | None
) -> None:
    """Raise ValueError for what makes no sense.

    Args:
        full: Whether `--hypothesis` was given.
        examples: Cases for each op and direction.
        seconds: Time limit for each.
        log: Where each case is noted.
    """
    given = {"--fuzz-examples": examples, "--fuzz-seconds": seconds, "--fuzz-log": log}
    for option, value in given.items():
        if value is not None and not full:
            raise ValueError(f"{option} needs --hypothesis")
        if isinstance(value, int | float) and value <= 0:
            raise ValueError(f"{option}: expected a positive number, got {value}")
    if log is not None and not log.parent.is_dir():
        raise ValueError(f"--fuzz-log: no folder {log.parent}")
