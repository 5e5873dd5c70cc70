"""A convolution through oneDNN whose weight is packed once for each shape of input."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sepconv.kernels.geometry import Sides
from sepconv.ops import reference
from sepconv.ops.onednn import Settings, Source, activate_, convolve, pack, packs

_MOST_SHAPES = 4  # of inputs that a convolution keeps something for
_Kept = TypeVar("_Kept")


class _Made(NamedTuple):
    """What was packed, by shape of the input."""

    source: Source
    packed: dict[Any, Tensor]


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
        >>> conv(x, weight, None, (0, 0, 0, 0), "relu")[0, 0] if conv.takes(weight) else None
        tensor([[3., nan]])
    """

    def __init__(self, stride: int, groups: int) -> None:
        self._stride, self._groups = stride, groups
        self._made: _Made | None = None

    def __deepcopy__(self, memo: object) -> "PackedConv2d":
        return PackedConv2d(self._stride, self._groups)

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedConv2d, (self._stride, self._groups)

    def takes(self, weight: Tensor) -> bool:
        """Whether this weight can be packed. Asked before each call, it looks for changes."""
        if self._made is None or not self._made.source.is_of(weight):
            if not packs(weight):
                return False
            self._made = _Made(Source.of(weight), {})
        return True

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: Sides,
        activation: str | None = None,
        residual: Any = None,
    ) -> Tensor:
        """Return `activation(x * weight + bias + residual)`, channels_last and fresh.

        Args:
            x: `[N, C, H, W]`, `usable` with the weight and the bias.
            weight: `[K, C/groups, R, S]`, as `takes` has just allowed.
            bias: `[K]`, or none.
            padding: Top, bottom, left, right.
            activation: As the ops name it.
            residual: Whatever adds to the result, or none.
        """
        x, before = evenly_padded(x, padding)
        settings = Settings.of(before, self._stride, self._groups)
        early = activation if residual is None else None
        y = convolve(x, self._weight_for(x, weight, settings), bias, settings, early)
        return y if residual is None else add_activate_(y, residual, activation)

    def _weight_for(self, x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
        # Read once and replaced as a whole: another thread may run the same convolution.
        made = self._made
        assert made is not None
        key = (x.shape, *settings.padding)
        packed = made.packed.get(key)
        if packed is None:
            packed = pack(weight, settings, x.shape)
            self._made = made._replace(packed=with_newest(made.packed, key, packed))
        return packed


def with_newest(kept: Mapping[Any, _Kept], key: Any, value: _Kept) -> dict[Any, _Kept]:
    """The last entries of `kept` and a new one: not more than a convolution may keep."""
    return {**dict(list(kept.items())[1 - _MOST_SHAPES :]), key: value}


def evenly_padded(x: Tensor, padding: Sides) -> tuple[Tensor, tuple[int, int]]:
    """The input, channels_last, padded if its sides differ; and what is left to pad."""
    top, bottom, left, right = padding
    if top != bottom or left != right:
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return x.contiguous(memory_format=torch.channels_last), (top, left)


def add_activate_(y: Tensor, residual: Any, activation: str | None) -> Tensor:
    """`activation(y + residual)`, in y where the residual's shape and type allow it."""
    if joins(residual, y):
        return activate_(y.add_(residual), activation)
    return reference.activate(y + residual, activation)


def joins(residual: Any, y: Tensor) -> bool:
    """Whether a residual can be added in place: no broadcasting, no promotion, no gradient."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == y.shape
        and residual.dtype == y.dtype
        and not (residual.requires_grad and torch.is_grad_enabled())
    )
