"""Separable convolutions on a CPU strip by strip, so that what lies between stays in the cache.

Layer by layer, each of the filter sets of a separable convolution writes a tensor as large as its
input and reads it back, and each product but the first reads and writes the whole output: all of
it through memory, into pages that the system often maps anew. Here a strip, which is some images or
some rows of one, goes through all filter sets before the next strip begins. A strip is as large as
the cache allows and not smaller, for each pays the fixed costs of its operators, 10 to 60 us.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sepconv.kernels.geometry import Geometry, Sides
from sepconv.ops import reference
from sepconv.ops.onednn import Source, activate_, depthwise, pack_depthwise, packs

# Of a strip's input, of one filter set's result and of the output together, for each thread. From 2
# to 8 MB the time is about the same; smaller strips pay for calls, larger ones for memory.
STRIP_BYTES = 4 * 2**20


def _strip_bytes() -> int:
    return STRIP_BYTES * torch.get_num_threads()


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


class _Prepared(NamedTuple):
    """The weights as the strips need them."""

    sources: tuple[Source, Source]
    filters: Sequence[Tensor]  # of each set, packed
    products: Sequence[Tensor]  # of each set [C, K]


class StripedSeparableConv2d:
    """A separable convolution that keeps its weights prepared.

    They are prepared at the first call, and again when they are others or were written to. A copy
    holds none.

    Args:
        stride: Of both dimensions of the depthwise convolution.

    Example:
        >>> conv, dw, pw = StripedSeparableConv2d(1), torch.ones(6, 1, 3, 3), torch.ones(4, 6, 1, 1)
        >>> conv(torch.ones(1, 3, 5, 5), dw, pw, None, None, (1, 1, 1, 1))[0, 0, 0]
        tensor([24., 36., 36., 36., 24.])
    """

    def __init__(self, stride: int) -> None:
        self._stride = stride
        self._prepared: _Prepared | None = None

    def __deepcopy__(self, memo: object) -> "StripedSeparableConv2d":
        return StripedSeparableConv2d(self._stride)

    def __reduce__(self) -> tuple[Any, ...]:
        return StripedSeparableConv2d, (self._stride,)

    def takes(self, x: Tensor, weight_dw: Tensor, weight_pw: Tensor, padding: Sides) -> bool:
        """Whether these weights can be prepared and fit the input, and strips are worth it.

        Of one filter per channel only large tensors are: packed convolutions, one after the other,
        take a tenth less while memory lasts.
        """
        filters, channels = len(weight_dw), x.shape[1]
        if filters % channels or weight_pw.shape[1] != filters:
            return False
        if not (packs(weight_dw) and packs(weight_pw)):
            return False
        geometry = Geometry((self._stride, self._stride), padding)
        p, q = geometry.output_size(x.shape[2:], weight_dw.shape[2:])
        if p < 1 or q < 1:
            return False
        work = x.numel() + len(x) * p * q * (channels + len(weight_pw))
        return filters > channels or work * x.element_size() > 2 * _strip_bytes()

    def __call__(
        self,
        x: Tensor,
        weight_dw: Tensor,
        weight_pw: Tensor,
        bias_dw: Tensor | None,
        bias_pw: Tensor | None,
        padding: Sides,
        activation_mid: str | None = None,
        activation: str | None = None,
        residual: Any = None,
    ) -> Tensor:
        """Return the separable convolution, channels_last and fresh.

        Args:
            x: `[N, C, H, W]`, `usable` with the weights and biases.
            weight_dw: `[C*M, 1, R, S]`, as `takes` allows.
            weight_pw: `[K, C*M, 1, 1]`, likewise.
            bias_dw: `[C*M]`, or none.
            bias_pw: `[K]`, or none.
            padding: Top, bottom, left, right.
            activation_mid: Between the two, as the ops name it.
            activation: At the end.
            residual: Whatever adds to the result, or none.
        """
        top, bottom, left, right = padding
        if top != bottom or left != right:
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        x = x.contiguous(memory_format=torch.channels_last)
        n, channels, h, w = x.shape
        stride, filter_size, features = self._stride, weight_dw.shape[2:], len(weight_pw)
        p, q = Geometry((stride, stride), (top, top, left, left)).output_size((h, w), filter_size)
        y = x.new_empty((n * p * q, features))  # whatever the default dtype and device are
        joins = (
            isinstance(residual, Tensor)
            and residual.shape == (n, features, p, q)
            and residual.dtype == y.dtype
            and not (residual.requires_grad and torch.is_grad_enabled())
        )
        added = residual.permute(0, 2, 3, 1).reshape(y.shape) if joins else None
        late = residual is not None and not joins

        filters, products = self._weights(x, weight_dw, weight_pw)
        biases: Sequence[Tensor | None] = [None] * len(filters)
        if bias_dw is not None:
            biases = bias_dw.view(channels, -1).t().contiguous().unbind()  # oneDNN reads no strides
        each = channels * (1 + stride * stride) + features
        most = _strip_bytes() // (each * y.element_size())
        for strip in strips_of((n, h), (p, q), filter_size[0], stride, top, most):
            part = x.narrow(0, *strip.images).narrow(2, *strip.rows)
            out = y.narrow(0, *strip.pixels)
            begun = bias_pw
            if added is not None:
                begun = _sum(added.narrow(0, *strip.pixels), bias_pw, out)
            settings = ([strip.padding, left], stride)
            for packed, bias, product in zip(filters, biases, products, strict=True):
                z = depthwise(part, packed, bias, *settings, activation_mid)
                rows = z.permute(0, 2, 3, 1).narrow(1, *strip.kept).reshape(-1, channels)
                begun = _multiply_add(begun, rows, product, out)
            if not late:
                activate_(out, activation)
        result = y.view(n, p, q, features).permute(0, 3, 1, 2)
        return reference.activate(result + residual, activation) if late else result

    def _weights(
        self, x: Tensor, dw: Tensor, pw: Tensor
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        # Read once and replaced as a whole: another thread may run the same convolution.
        made = self._prepared
        if made is None or not (made.sources[0].is_of(dw) and made.sources[1].is_of(pw)):
            channels = x.shape[1]
            sets = len(dw) // channels
            sources = (Source.of(dw), Source.of(pw))
            # Depthwise filters have one layout for inputs of every shape.
            filters = [pack_depthwise(dw[m::sets], self._stride, x.shape) for m in range(sets)]
            with torch.inference_mode(False):
                by_set = pw.detach().reshape(len(pw), channels, sets).permute(2, 1, 0)
                products = by_set.contiguous().unbind()
            self._prepared = made = _Prepared(sources, filters, products)
        return made.filters, made.products


def _sum(added: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return added if bias is None else torch.add(added, bias, out=out)


def _multiply_add(begun: Tensor | None, rows: Tensor, product: Tensor, out: Tensor) -> Tensor:
    """`begun + rows @ product` in `out`, which `begun` may be."""
    if begun is None:
        return torch.mm(rows, product, out=out)
    return torch.addmm(begun, rows, product, out=out)
