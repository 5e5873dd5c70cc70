"""Progress bars: on a terminal only, and only for work that takes a while."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Iterate over `items` with a progress bar on standard error where that is a terminal.

    >>> list(track([1, 2], "counting"))
    [1, 2]
    """
    console = Console(stderr=True)
    yield from rich_track(
        items, description, console=console, disable=not console.is_terminal, transient=True
    )


def track_batches(batches: Iterable[Item], description: str) -> Iterator[Item]:
    """The same for an iterable whose length may be unknown."""
    console = Console(stderr=True)
    yield from rich_track(
        batches, description, console=console, disable=not console.is_terminal, transient=True
    )
