"""Inference convolutions on a CPU through oneDNN with weights packed once.

`torch.conv2d` rearranges its weights into oneDNN's blocked layout at every call. The operators that
`torch.compile` uses for frozen models do it once. They have no autograd, so they only serve tensors
that need none. Of their fused activations only those are used that keep NaN: relu turns it into 0.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Sides = tuple[int, int, int, int]

# By our name of an activation: oneDNN's name and algorithm.
FUSED_ACTIVATIONS = {
    "silu": ("swish", ""),
    "hardswish": ("hardswish", ""),
    "gelu": ("gelu", "none"),
}


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
    every call, slowly. So it is packed at the first call, and again when the shape changes.

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
        self._packed: tuple[Any, Tensor] | None = None

    def __call__(self, x: Tensor, padding: Sides, activation: str | None = None) -> Tensor:
        """Return `activation(x * weight + bias)`, channels_last and fresh, for `x [N, C, H, W]`.

        Args:
            x: As `usable` allows.
            padding: Top, bottom, left, right.
            activation: One of `FUSED_ACTIVATIONS`.
        """
        name, algorithm = ("none", "") if activation is None else FUSED_ACTIVATIONS[activation]
        top, bottom, left, right = padding
        if top != bottom or left != right:
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        return self._convolve(
            x.contiguous(memory_format=torch.channels_last),
            self._weight_for(x.shape, [top, left]),
            self._bias,
            [top, left],
            self._stride,
            self._dilation,
            self._groups,
            name,
            [],
            algorithm,
        )

    def _weight_for(self, shape: torch.Size, padding: list[int]) -> Tensor:
        packed = self._packed  # read once: another thread may replace it
        if packed is None or packed[0] != (shape, padding):
            settings = (padding, self._stride, self._dilation, self._groups)
            packed = (shape, padding), self._reorder(self._weight, *settings, list(shape))
            self._packed = packed
        return packed[1]
