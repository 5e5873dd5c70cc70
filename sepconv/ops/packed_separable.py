"""A separable convolution on a CPU through oneDNN, its weights prepared once.

oneDNN runs a depthwise convolution fast where each channel has one filter. So several filters per
channel run as that many sets of one each, and the products of all sets add to one output. Tensors
that the cache holds go through each set whole, larger ones strip by strip (`strips.py`).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from sepconv.kernels.geometry import Geometry, Sides
from sepconv.ops import reference
from sepconv.ops.onednn import Settings, Source, activate_, convolve, convolve_add_, pack, packs
from sepconv.ops.packed import add_activate_, evenly, evenly_padded, joins, with_newest
from sepconv.ops.reference import Epilogue
from sepconv.ops.strips import Strip, strips_for

_POINTWISE = Settings.of((0, 0), 1, 1)


_Biases = tuple[Tensor | None, Tensor | None]


class PackedSeparableConv2d:
    """The weights of a separable convolution, prepared for the inputs it gets.

    They are prepared at the first call, again for each new shape, and again when they are other
    tensors or were written to. A copy holds none.

    Args:
        stride: Of both dimensions of the depthwise convolution.

    Example:
        >>> conv, dw, pw = PackedSeparableConv2d(1), torch.ones(6, 1, 3, 3), torch.ones(4, 6, 1, 1)
        >>> x = torch.ones(1, 3, 5, 5)
        >>> run = conv.prepared(x, dw, pw, (1, 1, 1, 1))
        >>> run(x, (None, None), Epilogue(None, None, None))[0, 0, 0] if run else None
        tensor([24., 36., 36., 36., 24.])
    """

    def __init__(self, stride: int) -> None:
        self._stride = stride
        self._made: _Made | None = None

    def __deepcopy__(self, memo: object) -> "PackedSeparableConv2d":
        return PackedSeparableConv2d(self._stride)

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedSeparableConv2d, (self._stride,)

    def prepared(
        self, x: Tensor, weight_dw: Tensor, weight_pw: Tensor, padding: Sides
    ) -> "Run | None":
        """What runs inputs like x, or None if these weights cannot be prepared for them.

        Args:
            x: `[N, C, H, W]`.
            weight_dw: `[C*M, 1, R, S]`.
            weight_pw: `[K, C*M, 1, 1]`.
            padding: Top, bottom, left, right.
        """
        # Read once and replaced as a whole: another thread may run the same convolution.
        made = self._made
        if made is None or not made.weights.are(weight_dw, weight_pw, x.shape[1]):
            if not _fit(weight_dw, weight_pw, x.shape[1]):
                return None
            made = _Made(_Weights(weight_dw, weight_pw, x.shape[1]), {})
        key = (x.shape, padding)
        if key not in made.runs:
            run = _prepared(x.shape, made.weights, padding, self._stride)
            self._made = made = _Made(made.weights, with_newest(made.runs, key, run))
        return made.runs[key]


def _fit(dw: Tensor, pw: Tensor, channels: int) -> bool:
    return len(dw) % channels == 0 and pw.shape[1] == len(dw) and packs(dw) and packs(pw)


class _Weights:
    """The weights by filter set; the m-th set has the m-th filter of each channel."""

    def __init__(self, dw: Tensor, pw: Tensor, channels: int) -> None:
        self._dw, self._pw = Source.of(dw), Source.of(pw)
        self.channels, self.features, self.element_size = channels, len(pw), pw.element_size()
        sets = len(dw) // channels
        self.filters = [self._dw.alias[m::sets] for m in range(sets)]
        self.mixing = [self._pw.alias[:, m::sets] for m in range(sets)]

    def are(self, dw: Tensor, pw: Tensor, channels: int) -> bool:
        """Whether they are these, not written to since."""
        return self._dw.is_of(dw) and self._pw.is_of(pw) and self.channels == channels

    @cached_property
    def products(self) -> Sequence[Tensor]:
        """[C, K] of each set, for inputs of all shapes."""
        with torch.inference_mode(False):
            return [mixing[:, :, 0, 0].t().contiguous() for mixing in self.mixing]


class _Made(NamedTuple):
    weights: _Weights
    runs: "dict[tuple[Size, Sides], Run | None]"


def _prepared(shape: Size, weights: _Weights, padding: Sides, stride: int) -> "Run | None":
    """What runs inputs of this shape; None if they give no pixel."""
    n, channels, h, w = shape
    sizes = weights.filters[0].shape
    p, q = Geometry((stride, stride), padding).output_size((h, w), sizes[2:])
    if p < 1 or q < 1:
        return None
    before, padded = evenly(shape, padding)
    settings = Settings.of(before, stride, channels)
    filters = [pack(each, settings, padded) for each in weights.filters]
    strips = strips_for(shape, sizes, weights.features, stride, padding, weights.element_size)
    if strips is not None:
        return StripedRun(padding, settings, filters, weights.products, (n, p, q), strips)
    middle = (n, channels, p, q)
    mixing = [pack(each.contiguous(), _POINTWISE, middle) for each in weights.mixing]
    return WholeRun(padding, settings, filters, mixing)


class WholeRun(NamedTuple):
    """Each set of filters one after the other, by convolutions; of inputs of one shape."""

    padding: Sides
    settings: Settings
    filters: Sequence[Tensor]  # of each set, packed
    mixing: Sequence[Tensor]  # likewise

    def __call__(self, x: Tensor, biases: _Biases, epilogue: Epilogue) -> Tensor:
        """Return the convolution `[N, K, P, Q]`, channels_last and fresh.

        Args:
            x: `[N, C, H, W]`, `usable` with the weights and biases.
            biases: `[C*M]` and `[K]`, or none.
            epilogue: Its residual may be whatever adds to the result.
        """
        (bias_dw, bias_pw), (mid, activation, residual) = biases, epilogue
        x = evenly_padded(x, self.padding)
        by_set = _by_set(bias_dw, len(self.filters))
        z = convolve(x, self.filters[0], by_set[0], self.settings, mid)
        ends = len(self.filters) == 1 and residual is None
        y = convolve(z, self.mixing[0], bias_pw, _POINTWISE, activation if ends else None)
        others = zip(self.filters[1:], by_set[1:], self.mixing[1:], strict=True)
        for filters, bias, mixing in others:
            z = convolve(x, filters, bias, self.settings, mid)
            convolve_add_(y, z, mixing, _POINTWISE)
        if residual is not None:
            return add_activate_(y, residual, activation)
        return y if ends else activate_(y, activation)


class StripedRun(NamedTuple):
    """All sets of a strip before the next strip, by products, which write where they are told."""

    padding: Sides
    settings: Settings
    filters: Sequence[Tensor]  # of each set, packed
    products: Sequence[Tensor]  # of each set [C, K]
    output: tuple[int, int, int]  # N, P, Q
    strips: Sequence[Strip]

    def __call__(self, x: Tensor, biases: _Biases, epilogue: Epilogue) -> Tensor:
        """Return the same as `WholeRun`."""
        (bias_dw, bias_pw), (mid, activation, residual) = biases, epilogue
        x = evenly_padded(x, self.padding)
        channels, features = self.products[0].shape
        _, left = self.settings.padding
        n, p, q = self.output
        y = x.new_empty((n * p * q, features))  # whatever the default dtype and device are
        result = y.view(n, p, q, features).permute(0, 3, 1, 2)
        added = None
        if joins(residual, result):
            added = residual.permute(0, 2, 3, 1).reshape(y.shape)
        late = residual if added is None else None

        by_set = _by_set(bias_dw, len(self.filters))
        for strip in self.strips:
            part = x.narrow(0, *strip.images).narrow(2, *strip.rows)
            out = y.narrow(0, *strip.pixels)
            begun = bias_pw
            if added is not None:
                begun = _sum(added.narrow(0, *strip.pixels), bias_pw, out)
            settings = self.settings._replace(padding=[strip.padding, left])
            for filters, bias, product in zip(self.filters, by_set, self.products, strict=True):
                z = convolve(part, filters, bias, settings, mid)
                rows = z.permute(0, 2, 3, 1).narrow(1, *strip.kept).reshape(-1, channels)
                begun = _multiply_add(begun, rows, product, out)
            if late is None:
                activate_(out, activation)
        return result if late is None else reference.activate(result + late, activation)


Run = WholeRun | StripedRun


def _by_set(bias: Tensor | None, sets: int) -> Sequence[Tensor | None]:
    if bias is None:
        return [None] * sets
    if sets == 1:
        return [bias]
    return bias.view(-1, sets).t().contiguous().unbind()  # oneDNN reads no strides


def _sum(added: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return added if bias is None else torch.add(added, bias, out=out)


def _multiply_add(begun: Tensor | None, rows: Tensor, product: Tensor, out: Tensor) -> Tensor:
    """`begun + rows @ product` in `out`, which `begun` may be."""
    if begun is None:
        return torch.mm(rows, product, out=out)
    return torch.addmm(begun, rows, product, out=out)
