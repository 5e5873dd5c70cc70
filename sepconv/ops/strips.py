"""Strips of a convolution, so that what lies between its parts stays in the cache.

Layer by layer, each of the filter sets of a separable convolution writes a tensor as large as its
input and reads it back, and each product but the first reads and writes the whole output: where the
cache does not hold them, through memory, into pages that the system often maps anew. A strip, which
is some images or some rows of one, goes through all filter sets before the next strip begins. It is
as large as the cache allows and not smaller, for each pays the fixed costs of its operators, 10 to
60 us.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from sepconv.kernels.geometry import Geometry, Sides

# Of a strip's input, of one filter set's result and of the output together, for each thread. From 2
# to 8 MB the time is about the same; smaller strips pay for calls, larger ones for memory.
STRIP_BYTES = 4 * 2**20
_WHOLE = 2  # strips' worth that take up to a quarter less time undivided


class Strip(NamedTuple):
    """Some images, or some rows of one; each pair is a first and how many."""

    images: tuple[int, int]
    rows: tuple[int, int]  # of the input
    padding: int  # above and below them
    kept: tuple[int, int]  # of the rows that a convolution of these gives
    pixels: tuple[int, int]  # of the output, of all images one after the other


def strips_of(
    size: tuple[int, int], output: tuple[int, int], taps: int, stride: int, padding: int, most: int
) -> Iterator[Strip]:
    """Divide a convolution along its images and rows.

    Args:
        size: Number of images, rows of each.
        output: Height and width of the output.
        taps: Rows of a filter.
        stride: Of the rows.
        padding: Above, and the same below.
        most: Pixels of the output in a strip, rounded up to rows of one image, or to the image
            where the padding is as high as the filter.

    Example:
        >>> [strip.rows for strip in strips_of((1, 8), (8, 8), 3, 1, 1, 32)]
        [(0, 5), (3, 5)]
    """
    (images, height), (p, q), most = size, output, max(most, 1)
    if p * q <= most or padding >= taps:  # no strip of nothing but padding
        each = max(most // (p * q), 1)
        for first in range(0, images, each):
            count = min(each, images - first)
            pixels = (first * p * q, count * p * q)
            yield Strip((first, count), (0, height), padding, (0, p), pixels)
        return
    each = -(-p // -(-p * q // most))  # about as many rows in every strip
    for image in range(images):
        for begin in range(0, p, each):
            count = min(each, p - begin)
            pixels = ((image * p + begin) * q, count * q)
            top = begin * stride - padding
            bottom = top + (count - 1) * stride + taps
            if top >= 0 and bottom <= height:
                yield Strip((image, 1), (top, bottom - top), 0, (0, count), pixels)
                continue
            # Padding is always on both sides: what it gives on the wrong one is not kept.
            skipped = min(begin, -(-padding // stride))
            top = (begin - skipped) * stride
            rows = (top, min(bottom, height) - top)
            yield Strip((image, 1), rows, padding, (skipped, count), pixels)


def strips_for(
    shape: Sequence[int],
    filters: Sequence[int],
    features: int,
    stride: int,
    padding: Sides,
    element_size: int,
) -> list[Strip] | None:
    """The strips of a separable convolution on the CPU; None where it is better undivided.

    Args:
        shape: Of the input [N, C, H, W], which is padded itself if its sides differ.
        filters: Shape of the depthwise filters [G, 1, R, S].
        features: Channels of the output.
        stride: Of the depthwise convolution.
        padding: Top, bottom, left, right.
        element_size: Bytes of a number.
    """
    n, channels, h, _ = shape
    top, bottom, left, right = padding
    p, q = Geometry((stride, stride), padding).output_size(shape[2:], filters[2:])
    floats = channels * (1 + stride * stride) + features  # for each pixel of the output
    most = STRIP_BYTES * torch.get_num_threads() // element_size
    if n * p * q * floats <= _WHOLE * most:
        return None
    if top != bottom or left != right:
        h, top = h + top + bottom, 0
    return list(strips_of((n, h), (p, q), filters[2], stride, top, most // floats))
