"""Where a convolution's filter goes: stride, padding and dilation as one value."""

from collections.abc import Sequence
from typing import NamedTuple

Pair = tuple[int, int]  # (vertical, horizontal)
Sides = tuple[int, int, int, int]  # (top, bottom, left, right)


class Geometry(NamedTuple):
    """Stride, padding and dilation of a convolution."""

    stride: Pair = (1, 1)
    padding: Sides = (0, 0, 0, 0)
    dilation: Pair = (1, 1)

    def output_size(self, size: Sequence[int], filter_size: Sequence[int]) -> Pair:
        """Height and width (P, Q) of the result; below 1 where the filter does not fit.

        Args:
            size: (H, W) of the input.
            filter_size: (R, S).

        Example:
            >>> Geometry((2, 2), (0, 1, 0, 1)).output_size((224, 224), (3, 3))
            (112, 112)
        """
        stride, (top, bottom, left, right), dilation = self
        p = (size[0] + top + bottom - dilation[0] * (filter_size[0] - 1) - 1) // stride[0] + 1
        q = (size[1] + left + right - dilation[1] * (filter_size[1] - 1) - 1) // stride[1] + 1
        return p, q
