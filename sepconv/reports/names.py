"""Long names of layers in little room: what neighbours have in common is written once."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from rich.cells import cell_len

INDENT = 2


class Line(NamedTuple):
    """One line of a list of names.

    Attributes:
        text: A whole name; or `prefix.` of the lines below it; or, indented, what follows that.
        row: Index of the name, None for a prefix.
    """

    text: str
    row: int | None


def folded(names: Sequence[str], room: int) -> list[Line]:
    """The names in lines of at most `room` characters, split at dots and nowhere else.

    Names that fit stay whole. A part between dots that does not fit by itself is longer than the
    room all the same.

    >>> for line in folded(["stem", "body.layer1.0.conv1", "body.layer1.0.conv2"], 12):
    ...     print(line.text)
    stem
    body.layer1.0.
      conv1
      conv2
    """
    return list(_lines([(name.split("."), i) for i, name in enumerate(names)], room, 0))


_Named = tuple[list[str], int]


def _lines(run: Sequence[_Named], room: int, depth: int) -> Iterator[Line]:
    """Of names that have their first `depth` parts in common."""

    def beginning(named: _Named) -> tuple[list[str], bool]:
        parts = named[0][: depth + 1]
        return parts, parts == named[0]  # a name may be the beginning of another

    for _, neighbours in groupby(run, beginning):
        group = list(neighbours)
        common = _common([parts for parts, _ in group])
        if _width(group, 0) <= room:
            yield from (Line(".".join(parts), row) for parts, row in group)
        elif len(group) > 1 and common > depth and _width(group, common) > room - INDENT:
            yield from _lines(group, room, common)
        else:
            indent = INDENT * " " if common else ""
            if common:
                yield Line(".".join(group[0][0][:common]) + ".", None)
            yield from (Line(indent + ".".join(parts[common:]), row) for parts, row in group)


def _width(group: Sequence[_Named], start: int) -> int:
    return max(cell_len(".".join(parts[start:])) for parts, _ in group)


def _common(names: Sequence[Sequence[str]]) -> int:
    """How many parts all have in common, the last of each apart."""
    most = min(map(len, names)) - 1
    first = names[0]
    return next((i for i in range(most) if any(parts[i] != first[i] for parts in names)), most)
