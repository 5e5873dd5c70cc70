"""Where a convolution's filter goes: stride, padding and dilation as one value; rules of padding.

At stride 2 the rules sample different pixels: a network that runs with another rule than the one it
was trained with has the right shapes and the wrong accuracy.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

Pair = tuple[int, int]  # (vertical, horizontal)
Sides = tuple[int, int, int, int]  # (top, bottom, left, right)

Rule = Literal["same", "keras"]
RULES = get_args(Rule)


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


def padding_sides(
    padding: Sequence[int] | str,
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> Sides:
    """Return the (top, bottom, left, right) zeros around a map of `size` pixels.

    `"same"` is TensorFlow's rule: just enough that the output has `ceil(size / stride)` pixels, an
    odd one at the bottom and the right. At stride 1, where the size does not matter, it is torch's
    own. `"keras"` is that of Keras' MobileNet, which pads only bottom and right wherever it
    strides, whatever the size; the two differ at odd sizes.

    Args:
        padding: (vertical, horizontal), `"valid"`, `"same"` or `"keras"`.
        size: H, W.
        kernel_size: R, S.
        stride: Of the rows, of the columns.
        dilation: Of the rows, of the columns.

    Example:
        >>> padding_sides("same", (224, 225), (3, 3), (2, 2))
        (0, 1, 1, 1)
        >>> padding_sides("keras", (224, 225), (3, 3), (2, 2))
        (0, 1, 0, 1)
    """
    if padding == "valid":
        return 0, 0, 0, 0
    if not isinstance(padding, str):
        vertical, horizontal = padding
        return vertical, vertical, horizontal, horizontal
    reach = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    ends = _same if padding == "same" else _keras
    top, bottom = ends(size[0], reach[0], stride[0])
    left, right = ends(size[1], reach[1], stride[1])
    return top, bottom, left, right


def fixed_sides(
    padding: Sequence[int] | str, kernel_size: Pair, stride: Pair, dilation: Pair
) -> Sides | Rule:
    """Return the sides where they are the same for inputs of every size, else the rule.

    >>> fixed_sides("same", (3, 3), (1, 1), (2, 2)), fixed_sides("same", (3, 3), (2, 2), (1, 1))
    ((2, 2, 2, 2), 'same')
    """
    if padding == "same" and stride != (1, 1):
        return "same"
    return padding_sides(padding, (1, 1), kernel_size, stride, dilation)


def _same(size: int, reach: int, stride: int) -> Pair:
    total = max(reach + 1 - (size % stride or stride), 0)
    return total // 2, total - total // 2


def _keras(size: int, reach: int, stride: int) -> Pair:
    half = reach // 2
    return (half, half) if stride == 1 else (0, half)
