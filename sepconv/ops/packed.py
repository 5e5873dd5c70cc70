"""A convolution through oneDNN whose weight is packed once for each shape of input."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from sepconv.kernels.geometry import Sides
from sepconv.ops import reference
from sepconv.ops.onednn import Settings, Source, activate_, convolve, pack, packs

_MOST_SHAPES = 4  # of inputs that a convolution keeps something for
_Kept = TypeVar("_Kept")


class PackedConv2d:
    """A convolution that keeps its weight in the layout that oneDNN wants for the inputs it gets.

    The layout depends on the input's shape: a weight packed for another one would be rearranged at
    every call, slowly. So it is packed at the first call, again for each new shape, and again when
    the weight is another tensor or was written to. A copy holds no weights.

    Args:
        stride: Of both dimensions.
        groups: As in `torch.nn.functional.conv2d`.

    Example:
        >>> conv = PackedConv2d(1, 1)
        >>> x, weight = torch.tensor([1.0, float("nan")]).expand(1, 3, 1, 2), torch.ones(4, 3, 1, 1)
        >>> run = conv.prepared(x, weight, (0, 0, 0, 0))
        >>> run(x, None, "relu", None)[0, 0] if run else None
        tensor([[3., nan]])
    """

    def __init__(self, stride: int, groups: int) -> None:
        self._stride, self._groups = stride, groups
        self._made: _Made | None = None

    def __deepcopy__(self, memo: object) -> "PackedConv2d":
        return PackedConv2d(self._stride, self._groups)

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedConv2d, (self._stride, self._groups)

    def prepared(self, x: Tensor, weight: Tensor, padding: Sides) -> "ConvolutionRun | None":
        """What runs inputs like x, or None if the weight cannot be packed.

        Args:
            x: `[N, C, H, W]`.
            weight: `[K, C/groups, R, S]`.
            padding: Top, bottom, left, right.
        """
        # Read once and replaced as a whole: another thread may run the same convolution.
        made = self._made
        if made is None or not made.source.is_of(weight):
            if not packs(weight):
                return None
            made = _Made(Source.of(weight), {})
        key = (x.shape, padding)
        run = made.runs.get(key)
        if run is None:
            before, padded = evenly(x.shape, padding)
            settings = Settings.of(before, self._stride, self._groups)
            run = ConvolutionRun(padding, settings, pack(weight, settings, padded))
            self._made = _Made(made.source, with_newest(made.runs, key, run))
        return run


class ConvolutionRun(NamedTuple):
    """A convolution of inputs of one shape, by a packed weight."""

    padding: Sides
    settings: Settings
    packed: Tensor

    def __call__(
        self, x: Tensor, bias: Tensor | None, activation: str | None, residual: Any
    ) -> Tensor:
        """Return `activation(x * weight + bias + residual)`, channels_last and fresh.

        Args:
            x: `[N, C, H, W]`, `usable` with the weight and the bias.
            bias: `[K]`, or none.
            activation: As the ops name it.
            residual: Whatever adds to the result, or none.
        """
        x = evenly_padded(x, self.padding)
        if residual is None:
            return convolve(x, self.packed, bias, self.settings, activation)
        y = convolve(x, self.packed, bias, self.settings, None)
        return add_activate_(y, residual, activation)


class _Made(NamedTuple):
    source: Source
    runs: dict[tuple[Size, Sides], ConvolutionRun]


def with_newest(kept: Mapping[Any, _Kept], key: Any, value: _Kept) -> dict[Any, _Kept]:
    """The last entries of `kept` and a new one: not more than a convolution may keep."""
    return {**dict(list(kept.items())[1 - _MOST_SHAPES :]), key: value}


def evenly(shape: Size, padding: Sides) -> tuple[tuple[int, int], list[int]]:
    """What a convolution pads above and to the left, and the shape of what it pads.

    oneDNN pads the same below and to the right; the rest is done before.
    """
    n, channels, h, w = shape
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return (top, left), [n, channels, h, w]
    return (0, 0), [n, channels, h + top + bottom, w + left + right]


def evenly_padded(x: Tensor, padding: Sides) -> Tensor:
    """The input, channels_last, and padded if its sides differ."""
    top, bottom, left, right = padding
    if top != bottom or left != right:
        x = F.pad(x, (left, right, top, bottom))
    return x.contiguous(memory_format=torch.channels_last)


def add_activate_(y: Tensor, residual: Any, activation: str | None) -> Tensor:
    """`activation(y + residual)`, in y where the residual's shape and type allow it."""
    if joins(residual, y):
        return activate_(y.add_(residual), activation)
    return reference.activate(y + residual, activation)


def joins(residual: Any, y: Tensor) -> TypeGuard[Tensor]:
    """Whether a residual can be added in place: no broadcasting, no promotion, no gradient."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == y.shape
        and residual.dtype == y.dtype
        and not (residual.requires_grad and torch.is_grad_enabled())
    )
