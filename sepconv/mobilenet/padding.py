"""The three padding conventions of MobileNet checkpoints, as explicit sides.

At stride 2 they sample different pixels: a network run with another convention than the one it was
trained with has the right shapes and the wrong accuracy.
"""

from typing import Literal

PaddingRule = Literal["symmetric", "same", "keras"]
Sides = tuple[int, int, int, int]


def padding_sides(rule: PaddingRule, size: tuple[int, int], kernel_size: int, stride: int) -> Sides:
    """Return `(top, bottom, left, right)` zeros to add around a map of `size` pixels.

    `"symmetric"` adds `kernel_size // 2` on every side (PyTorch's habit). `"same"` is TensorFlow's
    rule: just enough that the output has `ceil(size / stride)` pixels, the odd one at the bottom
    and right. `"keras"` is that of Keras' own MobileNet, which pads only bottom and right wherever
    a depthwise layer strides, whatever the size; it differs from `"same"` at odd sizes.

    Example:
        >>> padding_sides("same", (224, 225), 3, 2)
        (0, 1, 1, 1)
        >>> padding_sides("keras", (224, 225), 3, 2)
        (0, 1, 0, 1)
    """
    half = kernel_size // 2
    if rule == "symmetric" or (rule == "keras" and stride == 1):
        return half, half, half, half
    if rule == "keras":
        return 0, half, 0, half
    (top, bottom), (left, right) = (_same(n, kernel_size, stride) for n in size)
    return top, bottom, left, right


def _same(n: int, kernel_size: int, stride: int) -> tuple[int, int]:
    total = max(kernel_size - (n % stride or stride), 0)
    return total // 2, total - total // 2
