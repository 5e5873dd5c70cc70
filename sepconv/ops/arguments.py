"""Arguments as users write them, brought to one form."""

from collections.abc import Sequence
from typing import TypeAlias

Pair = tuple[int, int]
Sides = tuple[int, int, int, int]
IntPair: TypeAlias = int | Sequence[int]
Padding: TypeAlias = int | str | Sequence[int] | Sequence[Sequence[int]]


def pair(value: IntPair) -> Pair:
    """Return `(height, width)` of an int or a pair."""
    if isinstance(value, int):
        return value, value
    h, w = value
    return h, w


def sides(padding: Padding, kernel_size: Pair, dilation: Pair) -> Sides:
    """Return `(top, bottom, left, right)`."""
    if isinstance(padding, int):
        return padding, padding, padding, padding
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        h, w = ((k - 1) * d for k, d in zip(kernel_size, dilation, strict=True))
        return h // 2, h - h // 2, w // 2, w - w // 2
    h, w = padding
    top, bottom = pair(h)
    left, right = pair(w)
    return top, bottom, left, right
