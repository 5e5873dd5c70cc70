"""Inference convolutions on a CPU through oneDNN with weights packed once.

`torch.conv2d` rearranges its weights into oneDNN's blocked layout at every call. The operators that
`torch.compile` uses for frozen models do it once. They have no autograd, so they only serve tensors
that need none. Fused relu and relu6 turn NaN into 0, so they are used where no NaN can arise.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sepconv.ops.memory import keep_freed_memory

Sides = tuple[int, int, int, int]

# By our name of an activation: oneDNN's name, scalars and algorithm.
_Fused = tuple[str, list[float], str]
FUSED_ACTIVATIONS: dict[str, _Fused] = {
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
    "gelu": ("gelu", [], "none"),
}
# Fused where no NaN can arise, else done in place.
_FUSED_IF_FINITE: dict[str, _Fused] = {
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
}
_IN_PLACE: dict[str | None, Callable[[Tensor], Tensor]] = {
    "relu": F.relu_,
    "relu6": lambda y: F.hardtanh_(y, 0.0, 6.0),
}
_NONE: _Fused = ("none", [], "")
_FUSED = FUSED_ACTIVATIONS | _FUSED_IF_FINITE
_MOST_SHAPES = 4  # of inputs that a convolution keeps packed weights for
# Tensors between two layers of a chain are kept below this, by cutting the batch.
_CHUNK_BYTES = 2**24
# What a value may be; a thousandth of the range, since algorithms of convolution may use the rest.
_LARGEST = 1e-3 * torch.finfo(torch.float32).max


def _operators() -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        namespace: Any = torch.ops.mkldnn
        return namespace._reorder_convolution_weight, namespace._convolution_pointwise
    except AttributeError:
        return None


_OPERATORS = _operators()


def usable(x: Tensor, *weights: Tensor) -> bool:
    """Whether a convolution of these tensors may run through packed weights, unnoticed.

    It may not where anything watches or transforms single operators: autograd, autocast,
    compilation, tracing, functorch, dispatch modes (flop counters, fake tensors).

    Example:
        >>> usable(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3, requires_grad=True))
        False
    """
    tensors = (x, *weights)
    return (
        _OPERATORS is not None
        and bool(torch.backends.mkldnn.enabled)
        and all(t.device.type == "cpu" and t.dtype is torch.float32 for t in tensors)
        and x.numel() > 0
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and type(x) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class PackedConv2d:
    """A convolution whose weight lies in the layout that oneDNN wants for the inputs it gets.

    The layout depends on the input's shape: a weight packed for another one would be rearranged at
    every call, slowly. So it is packed at the first call, and again for each new shape.

    Args:
        weight: `[K, C/groups, R, S]`, float32, on the CPU.
        bias: `[K]`, or none.
        stride: Of both dimensions.
        groups: As in `torch.nn.functional.conv2d`.
        dilation: Of both dimensions.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: int, groups: int, dilation: int = 1
    ) -> None:
        assert _OPERATORS is not None
        self._reorder, self._convolve = _OPERATORS
        self._weight = weight
        self._bias = bias
        self._stride = [stride, stride]
        self._dilation = [dilation, dilation]
        self._groups = groups
        self._packed: dict[Any, Tensor] = {}

    def __call__(
        self, x: Tensor, padding: Sides, activation: str | None = None, *, finite: bool = False
    ) -> Tensor:
        """Return `activation(x * weight + bias)`, channels_last and fresh, for `x [N, C, H, W]`.

        Args:
            x: As `usable` allows.
            padding: Top, bottom, left, right.
            activation: As the ops name it.
            finite: Promises that the convolution gives no NaN; see `PackedChain`.
        """
        top, bottom, left, right = padding
        if top != bottom or left != right:
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        after = None if finite else _IN_PLACE.get(activation)
        fused = None if after else activation
        x = x.contiguous(memory_format=torch.channels_last)
        y = self._convolve(x, *self._arguments(x.shape, [top, left], fused))
        return after(y) if after else y

    def bounds(self, largest: Tensor) -> Tensor:
        """Return `[K]`: what no result exceeds if no input of channel c exceeds `largest[c]`.

        In float64, without activation. A weight of NaN or infinity shows as such.
        """
        weight = self._weight.double().abs().sum((2, 3))  # [K, C/groups]
        inputs = largest.view(self._groups, 1, -1)
        products = weight.view(self._groups, -1, weight.shape[1]) * inputs
        bound = products.sum(2).flatten()
        return bound if self._bias is None else bound + self._bias.double().abs()

    @property
    def input_channels(self) -> int:
        """C."""
        return self._weight.shape[1] * self._groups

    def output_shape(self, size: tuple[int, int], padding: Sides) -> tuple[int, int, int]:
        """K, P and Q for inputs of H by W."""
        top, bottom, left, right = padding
        padded = (size[0] + top + bottom, size[1] + left + right)
        p, q = (
            (n - dilation * (filter_size - 1) - 1) // stride + 1
            for n, filter_size, stride, dilation in zip(
                padded, self._weight.shape[2:], self._stride, self._dilation, strict=True
            )
        )
        return self._weight.shape[0], p, q

    def _arguments(self, shape: Sequence[int], padding: list[int], fused: str | None) -> Any:
        name, scalars, algorithm = _NONE if fused is None else _FUSED[fused]
        return (
            self._weight_for(tuple(shape), padding),
            self._bias,
            padding,
            self._stride,
            self._dilation,
            self._groups,
            name,
            scalars,
            algorithm,
        )

    def _weight_for(self, shape: tuple[int, ...], padding: list[int]) -> Tensor:
        key = (shape, *padding)
        packed = self._packed.get(key)
        if packed is None:
            keep_freed_memory()
            settings = (padding, self._stride, self._dilation, self._groups)
            packed = self._reorder(self._weight, *settings, list(shape))
            # A new dictionary: another thread may be reading the old one.
            kept = list(self._packed.items())[1 - _MOST_SHAPES :]
            self._packed = {**dict(kept), key: packed}
        return packed


class Layer(NamedTuple):
    """A convolution of a chain.

    Attributes:
        convolution: Its weights.
        padding: Gives the sides to pad from the height and width of its input.
        activation: Behind it, as the ops name it.
    """

    convolution: PackedConv2d
    padding: Callable[[tuple[int, int]], Sides]
    activation: str | None


class PackedChain:
    """Convolutions in a row, whose activations are all fused unless a NaN could get lost in one.

    Where the inputs are finite, and so are the weights, only an overflow makes a NaN: bounds of the
    values after each layer, which grow no faster than the largest input, exclude it. So one look at
    the input is enough for the whole chain; if it does not pass, relu and relu6 run as passes of
    their own, which keep NaN.

    Args:
        layers: At least one.

    Example:
        >>> conv = PackedConv2d(torch.ones(4, 3, 1, 1), None, 1, 1)
        >>> chain = PackedChain([Layer(conv, lambda size: (0, 0, 0, 0), "relu")])
        >>> chain(torch.tensor([1.0, float("nan")]).expand(1, 3, 1, 2))[0, 0]
        tensor([[3., nan]])
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = list(layers)
        self._largest = _largest_input(self._layers)

    def __call__(self, x: Tensor) -> Tensor:
        """Run the chain on `x [N, C, H, W]`, a few images at a time if they are large."""
        finite = self._stays_finite(x)
        parts = [self._run(part, finite) for part in x.split(self._images_at_once(x))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def outputs(self, x: Tensor, places: Sequence[int]) -> list[Tensor]:
        """Return what comes out of the layers at these places."""
        kept = dict.fromkeys(places, x)
        self._run(x, self._stays_finite(x), kept)
        return [kept[place] for place in places]

    def _run(self, x: Tensor, finite: bool, kept: dict[int, Tensor] | None = None) -> Tensor:
        last = max(kept) if kept else len(self._layers) - 1
        for place, (convolution, padding, activation) in enumerate(self._layers[: last + 1]):
            x = convolution(x, padding((x.shape[2], x.shape[3])), activation, finite=finite)
            if kept and place in kept:
                kept[place] = x
        return x

    def _stays_finite(self, x: Tensor) -> bool:
        low, high = torch.aminmax(x)  # both are NaN if one value is
        return -self._largest <= low.item() and high.item() <= self._largest

    def _images_at_once(self, x: Tensor) -> int:
        if len(x) == 1:
            return 1
        size, most = (x.shape[2], x.shape[3]), 0
        for convolution, padding, _ in self._layers:
            k, p, q = convolution.output_shape(size, padding(size))
            size, most = (p, q), max(most, k * p * q)
        images = max(1, _CHUNK_BYTES // (4 * max(most, 1)))
        parts = -(-x.shape[0] // images)
        return -(-x.shape[0] // parts)


def _largest_input(layers: Sequence[Layer]) -> float:
    """The largest input for which no value in the chain can overflow; below 0 if there is none."""
    channels = layers[0].convolution.input_channels
    bound, highest = torch.ones(channels, dtype=torch.float64), 1.0
    for convolution, _, activation in layers:
        bound = convolution.bounds(bound)
        highest = max(highest, bound.max().item()) if bound.isfinite().all() else math.inf
        if activation == "relu6":
            bound = bound.clamp(max=6.0)
    # The bounds are those of inputs up to 1.
    return _LARGEST / highest if highest < _LARGEST else -1.0
