"""Inference convolutions on a CPU through oneDNN with weights packed once.

`torch.conv2d` rearranges its weights into oneDNN's blocked layout at every call. The operators that
`torch.compile` uses for frozen models do it once. They have no autograd, so they only serve tensors
that need none. Their fused relu and relu6 turn NaN into 0, so those two run in place afterwards.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepconv.kernels.geometry import Pair
from sepconv.ops.backend import chosen_backend

# By our name of an activation: oneDNN's name, scalars and algorithm.
_FUSED: dict[str | None, tuple[str, list[float], str]] = {
    None: ("none", [], ""),
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
    "gelu": ("gelu", [], "none"),
}
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu_,
    "relu6": lambda y: F.hardtanh_(y, 0.0, 6.0),
    "silu": lambda y: F.silu(y, inplace=True),
    "hardswish": lambda y: F.hardswish(y, inplace=True),
    "gelu": torch.ops.aten.gelu_.default,
}
_MOST_SHAPES = 4  # of inputs that a convolution keeps packed weights for
_KINDS = (Tensor, nn.Parameter)


class _Operators(NamedTuple):
    reorder: Callable[..., Tensor]
    convolve: Callable[..., Tensor]
    convolve_add_: Callable[..., Tensor]
    multiply: Callable[..., Tensor]


def _operators() -> _Operators | None:
    if not torch.backends.mkldnn.is_available():
        return None
    ops = torch.ops.mkldnn
    try:
        # Naming the overload spares 12 us a call.
        return _Operators(
            ops._reorder_convolution_weight.default,
            ops._convolution_pointwise.default,
            ops._convolution_pointwise_.binary,
            ops._linear_pointwise.default,
        )
    except AttributeError:
        return None


_OPERATORS = _operators()


def usable(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a convolution of these tensors may run through packed weights, unnoticed.

    It may not where the caller chose a backend, nor where anything watches or transforms single
    operators: autograd, autocast, compilation, tracing, functorch, dispatch modes (flop counters,
    fake tensors). Whether the weight itself can be packed, `PackedConv2d` tells.

    Example:
        >>> usable(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3, requires_grad=True))
        False
    """
    # First: under torch.export a question about sizes would limit the batch.
    if torch.compiler.is_compiling() or _OPERATORS is None or type(x) is not Tensor:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters) if t is not None):
        return False
    return (
        x.is_cpu
        and x.dtype is torch.float32
        and x.numel() > 0
        and chosen_backend() == "auto"
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class Source(NamedTuple):
    """Which weight something was made from, and when.

    The alias keeps the storage alive: no other tensor can take its address.
    """

    weight: ReferenceType[Tensor]
    alias: Tensor
    address: int
    version: int

    @staticmethod
    def of(weight: Tensor) -> "Source":
        """Note this weight."""
        return Source(ref(weight), weight.detach(), weight.data_ptr(), weight._version)

    def is_of(self, weight: Tensor) -> bool:
        """Whether it is this weight or another view like it, not written to since."""
        if self.address != weight.data_ptr() or self.version != weight._version:
            return False
        if self.weight() is weight:
            return True
        return self.alias.shape == weight.shape and self.alias.stride() == weight.stride()


class Settings(NamedTuple):
    """Of a convolution, as oneDNN's operators take them."""

    padding: list[int]
    stride: list[int]
    dilation: list[int]
    groups: int

    @staticmethod
    def of(padding: Sequence[int], stride: int, groups: int) -> "Settings":
        """Padding above and to the left, and the same on the other sides."""
        return Settings(list(padding), [stride, stride], [1, 1], groups)


def fits(stride: Pair, dilation: Pair) -> bool:
    """Whether packed convolutions have this geometry: one stride, and filters without gaps."""
    return stride[0] == stride[1] and dilation == (1, 1)


def packs(weight: Tensor) -> bool:
    """Whether this weight can be packed. One made in inference mode does not tell of changes."""
    return (
        type(weight) in _KINDS
        and weight.is_cpu
        and weight.dtype is torch.float32
        and not weight.is_inference()
    )


def pack(weight: Tensor, settings: Settings, shape: Sequence[int]) -> Tensor:
    """The weight in the layout that oneDNN wants for inputs of this shape.

    Filters of one channel each have the same layout for all shapes.
    """
    assert _OPERATORS is not None
    return _OPERATORS.reorder(weight, *settings, list(shape))


def convolve(
    x: Tensor, packed: Tensor, bias: Tensor | None, settings: Settings, activation: str | None
) -> Tensor:
    """Return `activation(x * packed + bias)`, fresh and channels_last, of a dense such x."""
    assert _OPERATORS is not None
    fuses = activation in _FUSED
    fused = _FUSED[activation if fuses else None]
    y = _OPERATORS.convolve(x, packed, bias, *settings, *fused)
    return y if fuses else activate_(y, activation)


def convolve_add_(y: Tensor, x: Tensor, packed: Tensor, settings: Settings) -> Tensor:
    """Add `x * packed` to y, both dense and channels_last."""
    assert _OPERATORS is not None
    return _OPERATORS.convolve_add_(y, x, packed, None, *settings, "add", 1.0, None, [], None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Return `activation(x @ weight.T + bias)` of 2-D tensors, by the weight as it is.

    Between one row and the many for which packing pays, torch's own product is up to three times
    slower (4 x 25,088 by 4,096: 105 against 42 ms on two cores).
    """
    assert _OPERATORS is not None
    if len(x) == 1 or 0 in weight.shape:
        return activate_(F.linear(x, weight, bias), activation)
    y = _OPERATORS.multiply(x.contiguous(), weight, bias, "none", [], "")
    return activate_(y, activation)


def activate_(y: Tensor, activation: str | None) -> Tensor:
    """Activate a fresh tensor that nobody else reads, in place."""
    return y if activation is None else _IN_PLACE[activation](y)
