"""Inference convolutions on a CPU through oneDNN with weights packed once.

`torch.conv2d` rearranges its weights into oneDNN's blocked layout at every call. The operators that
`torch.compile` uses for frozen models do it once. They have no autograd, so they only serve tensors
that need none. Their fused relu and relu6 turn NaN into 0, so those two run in place afterwards.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepconv.kernels.geometry import Sides
from sepconv.ops import reference
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
    multiply: Callable[..., Tensor]


def _operators() -> _Operators | None:
    if not torch.backends.mkldnn.is_available():
        return None
    names = ("_reorder_convolution_weight", "_convolution_pointwise", "_linear_pointwise")
    try:
        # Naming the overload spares 12 us a call.
        return _Operators(*(getattr(torch.ops.mkldnn, name).default for name in names))
    except AttributeError:
        return None


_OPERATORS = _operators()


def usable(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a convolution of these tensors may run through packed weights, unnoticed.

    It may not where the caller chose a backend, nor where anything watches or transforms single
    operators: autograd, autocast, compilation, tracing, functorch, dispatch modes (flop counters,
    fake tensors). Whether the weight itself can be packed, `PackedConv2d.takes` tells.

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
    """Which weight something was made from, and when."""

    weight: Tensor
    version: int

    @staticmethod
    def of(weight: Tensor) -> "Source":
        """Note this weight. An alias keeps its storage alive: no other can take its address."""
        return Source(weight.detach(), weight._version)

    def is_of(self, weight: Tensor) -> bool:
        """Whether it is this weight, not written to since."""
        return self.weight.data_ptr() == weight.data_ptr() and self.version == weight._version


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
        top, bottom, left, right = padding
        if top != bottom or left != right:
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        x = x.contiguous(memory_format=torch.channels_last)
        settings = ([top, left], [self._stride] * 2, [1, 1], self._groups)
        early = activation if residual is None else None
        y = _convolved(x, self._weight_for(x, weight, settings), bias, settings, early)
        if residual is None:
            return y
        if not (
            isinstance(residual, Tensor) and residual.shape == y.shape and residual.dtype == y.dtype
        ):
            return reference.activate(y + residual, activation)
        return activate_(y.add_(residual), activation)

    def _weight_for(self, x: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> Tensor:
        # Read once and replaced as a whole: another thread may run the same convolution.
        made = self._made
        assert made is not None
        key = (x.shape, *settings[0])
        packed = made.packed.get(key)
        if packed is None:
            packed = _OPERATORS.reorder(weight, *settings, list(x.shape))  # type: ignore[union-attr]
            kept = list(made.packed.items())[1 - _MOST_SHAPES :]
            self._made = made._replace(packed={**dict(kept), key: packed})
        return packed


def _convolved(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    settings: tuple[Any, ...],
    activation: str | None,
) -> Tensor:
    """The convolution of a dense channels_last x, its activation fused where oneDNN's is ours."""
    assert _OPERATORS is not None
    fuses = activation in _FUSED
    fused = _FUSED[activation if fuses else None]
    y = _OPERATORS.convolve(x, packed, bias, *settings, *fused)
    return y if fuses else activate_(y, activation)


def packs(weight: Tensor) -> bool:
    """Whether this weight can be packed. One made in inference mode does not tell of changes."""
    return (
        type(weight) in _KINDS
        and weight.is_cpu
        and weight.dtype is torch.float32
        and not weight.is_inference()
    )


def pack_depthwise(weight: Tensor, stride: int, shape: Sequence[int]) -> Tensor:
    """One filter per channel `[C, 1, R, S]` as `depthwise` takes it.

    Its layout is the same for inputs of all shapes; one is asked for all the same.
    """
    assert _OPERATORS is not None
    padding = [taps // 2 for taps in weight.shape[2:]]
    return _OPERATORS.reorder(weight, padding, [stride] * 2, [1, 1], len(weight), list(shape))


def depthwise(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    stride: int,
    activation: str | None,
) -> Tensor:
    """Return `activation(x * weight + bias)`, channels_last as x, with `packed` filters."""
    return _convolved(x, packed, bias, (padding, [stride] * 2, [1, 1], x.shape[1]), activation)


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
