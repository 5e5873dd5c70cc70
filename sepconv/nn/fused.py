"""Convolutions for inference, with everything around them folded in. `sepconv.fuse` makes them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepconv import ops
from sepconv.kernels.geometry import Geometry
from sepconv.nn.promise import LARGEST_VALUE, Promise
from sepconv.ops import onednn, reference
from sepconv.ops.autocast import is_autocasting
from sepconv.ops.backend import chosen_backend

Pair = tuple[int, int]
Sides = tuple[int, int, int, int]

_NO_PADDING = (0, 0, 0, 0)
_PACKED_ROWS = 32  # below it there is nothing to win
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": lambda y: F.relu6(y, inplace=True),
    "silu": lambda y: F.silu(y, inplace=True),
    "hardswish": lambda y: F.hardswish(y, inplace=True),
    "gelu": F.gelu,
}


class _Packed:
    """A convolution in oneDNN's layout, made anew when its tensors change, never copied."""

    def __init__(self) -> None:
        self._of: tuple[Any, ...] | None = None
        self._convolution: onednn.PackedConv2d | None = None

    def forget(self) -> None:
        self._convolution = None

    def __deepcopy__(self, memo: object) -> "_Packed":
        return _Packed()

    def __reduce__(self) -> tuple[type["_Packed"], tuple[()]]:
        return _Packed, ()

    def get(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        groups: int,
        promise: Promise = Promise.NONE,
    ) -> onednn.PackedConv2d:
        if promise and self._convolution is not None:
            return self._convolution
        tensors = (weight,) if bias is None else (weight, bias)
        state = tuple((t.data_ptr(), t._version) for t in tensors)
        if self._convolution is None or state != self._of:
            self._convolution = onednn.PackedConv2d(weight, bias, stride, groups)
            self._of = state
        return self._convolution


class _Fused(nn.Module):
    """What the modules share: frozen parameters, and the end of a packed convolution."""

    activation: str | None

    def _freeze(self, name: str, value: Tensor | None, channels_last: bool = False) -> None:
        if value is not None and value.dim() == 4:
            layout = torch.channels_last if channels_last else torch.contiguous_format
            value = torch.empty_like(value, memory_format=layout).copy_(value.detach())
        frozen = None if value is None else nn.Parameter(value.detach(), requires_grad=False)
        self.register_parameter(name, frozen)

    def _finish(
        self,
        convolution: onednn.PackedConv2d,
        x: Tensor,
        padding: Sides,
        residual: Any = None,
        promise: Promise = Promise.NONE,
    ) -> Tensor:
        """Convolve, add the residual, activate."""
        if residual is None:
            return _convolve(convolution, x, padding, self.activation, promise)
        y = convolution(x, padding)
        if not _like(residual, y.shape, y.dtype):
            return reference.activate(y + residual, self.activation)
        y = y.add_(residual)  # a fresh tensor, like every result of a packed convolution
        return y if self.activation is None else _IN_PLACE[self.activation](y)


class FusedConv2d(_Fused):
    """`activation(conv(x) + bias + residual)` with frozen parameters.

    Args:
        weight: [K, C/groups, R, S].
        bias: [K] or None.
        stride: of the convolution.
        padding: top, bottom, left, right.
        dilation: of the filters.
        groups: as in `torch.nn.Conv2d`.
        activation: as the ops name it.
        channels_last: whether outputs are channels_last whatever the input's layout.

    Shape:
        x [N, C, H, W] or [C, H, W]; residual: anything that adds to the result.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair = (1, 1),
        padding: Sides = (0, 0, 0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
        activation: str | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self._freeze("weight", weight, channels_last)
        self._freeze("bias", bias, channels_last)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.activation = groups, activation
        plain = stride == (1, 1) and groups == 1 and not any(padding)
        self._pointwise = plain and weight.shape[2:] == (1, 1)
        self._depthwise = weight.shape[1] == 1 and weight.shape[0] % groups == 0 and groups > 1
        self._packable = channels_last and stride[0] == stride[1] and dilation == (1, 1)
        self._packed = _Packed()

    def forward(self, x: Tensor, residual: Any = None, promise: Promise = Promise.NONE) -> Tensor:
        """Convolve x, add the residual, activate."""
        if x.dim() == 3:
            other = residual[None] if isinstance(residual, Tensor) else residual
            return self.forward(x[None], other)[0]
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if self._packable and (promise or _may_pack(x, weight, bias)):
            if self._pointwise and residual is None and x.shape[2:] == (1, 1):
                return self._of_one_pixel(x)
            packed = self._packed.get(weight, bias, self.stride[0], self.groups, promise)
            return self._finish(packed, x, self.padding, residual, promise)
        if self._pointwise:
            shape = (x.shape[0], self.weight.shape[0], *x.shape[2:])
            if residual is None or _joins_op(residual, x, shape):
                return ops.pointwise_conv2d(x, self.weight, self.bias, self.activation, residual)
        top, bottom, left, right = self.padding
        if self._depthwise and residual is None:
            sides = ((top, bottom), (left, right))
            return ops.depthwise_conv2d(
                x, self.weight, self.bias, self.stride, sides, self.dilation, self.activation
            )
        even = (top, left)
        if top != bottom or left != right:
            x, even = F.pad(x, (left, right, top, bottom)), (0, 0)
        y = F.conv2d(x, self.weight, self.bias, self.stride, even, self.dilation, self.groups)
        y = y if residual is None else y + residual
        return reference.activate(y, self.activation)

    def largest(self, x: float, residual: float = 0.0) -> float:
        """What no value inside exceeds if no input does; see `sepconv.nn.promise`."""
        return _largest(self.weight, self.bias, self.activation, x, residual)

    def forget(self) -> None:
        """Pack the weights anew at the next call."""
        self._packed.forget()

    def _of_one_pixel(self, x: Tensor) -> Tensor:
        """As in squeeze-and-excitation blocks: a product with a vector, not worth a convolution."""
        y = F.linear(x.flatten(1), self.weight.flatten(1), self.bias)
        y = y if self.activation is None else _IN_PLACE[self.activation](y)
        return y[:, None, None, :].permute(0, 3, 1, 2)  # with the strides of channels_last

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"{tuple(self.weight.shape)}, stride={self.stride}, activation={self.activation}"


class FusedSeparableConv2d(_Fused):
    """A depthwise and a pointwise convolution as one op, with frozen parameters.

    Args:
        weight_dw: [C*M, 1, R, S].
        weight_pw: [K, C*M, 1, 1].
        bias_dw: [C*M] or None.
        bias_pw: [K] or None.
        stride: of the depthwise convolution.
        padding: top, bottom, left, right.
        dilation: of the depthwise filters.
        activation_mid: between the two, as the ops name it.
        activation: at the end.
        channels_last: whether outputs are channels_last whatever the input's layout.

    Shape:
        x [N, C, H, W] or [C, H, W]; residual: anything that adds to the result.
    """

    weight_dw: Tensor
    weight_pw: Tensor
    bias_dw: Tensor | None
    bias_pw: Tensor | None

    def __init__(
        self,
        weight_dw: Tensor,
        weight_pw: Tensor,
        bias_dw: Tensor | None = None,
        bias_pw: Tensor | None = None,
        stride: Pair = (1, 1),
        padding: Sides = (0, 0, 0, 0),
        dilation: Pair = (1, 1),
        activation_mid: str | None = None,
        activation: str | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self._freeze("weight_dw", weight_dw, channels_last)
        self._freeze("weight_pw", weight_pw, channels_last)
        self._freeze("bias_dw", bias_dw, channels_last)
        self._freeze("bias_pw", bias_pw, channels_last)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.activation_mid, self.activation = activation_mid, activation
        self._packable = channels_last and stride[0] == stride[1] and dilation == (1, 1)
        self._packed_dw, self._packed_pw = _Packed(), _Packed()

    def forward(self, x: Tensor, residual: Any = None, promise: Promise = Promise.NONE) -> Tensor:
        """Convolve x twice, add the residual, activate."""
        if x.dim() == 3:
            other = residual[None] if isinstance(residual, Tensor) else residual
            return self.forward(x[None], other)[0]
        tensors: Any = self._parameters.values()  # attributes would be slow to look up
        dw, pw, bias_dw, bias_pw = tensors
        # Several filters per channel leave oneDNN's fast path; the op goes around that.
        packable = self._packable and len(dw) == x.shape[1]
        if packable and (promise or _may_pack(x, dw, pw, bias_dw, bias_pw)):
            depthwise = self._packed_dw.get(dw, bias_dw, self.stride[0], len(dw), promise)
            z = _convolve(depthwise, x, self.padding, self.activation_mid, promise)
            pointwise = self._packed_pw.get(pw, bias_pw, 1, 1, promise)
            return self._finish(pointwise, z, _NO_PADDING, residual, promise)

        top, bottom, left, right = sides = self.padding
        inside = None
        if residual is not None:
            geometry = Geometry(self.stride, sides, self.dilation)
            p, q = geometry.output_size(x.shape[2:], dw.shape[2:])
            inside = residual if _joins_op(residual, x, (x.shape[0], len(pw), p, q)) else None
        split = residual is not inside
        y = ops.separable_conv2d(
            x,
            dw,
            pw,
            bias_dw,
            bias_pw,
            self.stride,
            ((top, bottom), (left, right)),
            self.dilation,
            self.activation_mid,
            None if split else self.activation,
            inside,
        )
        return reference.activate(y + residual, self.activation) if split else y

    def largest(self, x: float, residual: float = 0.0) -> float:
        """What no value inside exceeds if no input does; see `sepconv.nn.promise`."""
        z = _largest(self.weight_dw, self.bias_dw, self.activation_mid, x)
        return _largest(self.weight_pw, self.bias_pw, self.activation, z, residual)

    def forget(self) -> None:
        """Pack the weights anew at the next call."""
        self._packed_dw.forget()
        self._packed_pw.forget()

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        shapes = f"{tuple(self.weight_dw.shape)}, {tuple(self.weight_pw.shape)}"
        return f"{shapes}, stride={self.stride}, activation={self.activation}"


class FusedLinear(_Fused):
    """`activation(x @ weight.T + bias)` with frozen parameters; x [..., C], result [..., K].

    Args:
        weight: [K, C].
        bias: [K] or None.
        activation: as the ops name it.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
    ) -> None:
        super().__init__()
        self._freeze("weight", weight)
        self._freeze("bias", bias)
        self.activation = activation
        self._packed = _Packed()

    def forward(self, x: Tensor, promise: Promise = Promise.NONE) -> Tensor:
        """Mix the channels of each row, activate."""
        channels = self.weight.shape[1]
        # In this order: under torch.export a question about sizes would limit the batch.
        may = promise or _may_pack(x, self.weight, self.bias)
        if may and x.numel() >= _PACKED_ROWS * channels:
            # A matrix product is a 1x1 convolution; its rows are pixels.
            packed = self._packed.get(self.weight[:, :, None, None], self.bias, 1, 1, promise)
            pixels = x.reshape(1, 1, -1, channels).permute(0, 3, 1, 2)
            y = self._finish(packed, pixels, _NO_PADDING, None, promise)
            return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
        return reference.activate(F.linear(x, self.weight, self.bias), self.activation)

    def largest(self, x: float) -> float:
        """What no value inside exceeds if no input does; see `sepconv.nn.promise`."""
        return _largest(self.weight, self.bias, self.activation, x)

    def forget(self) -> None:
        """Pack the weights anew at the next call."""
        self._packed.forget()

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"{tuple(self.weight.shape)}, activation={self.activation}"


class FusedGate(nn.Module):
    """`x * gate` for a gate of one value per channel, over x where nobody can tell.

    The graph makes sure that nobody reads x afterwards; that autograd does not, the promise says.
    """

    def forward(self, x: Tensor, gate: Tensor, promise: Promise = Promise.NONE) -> Tensor:
        """Scale each channel of x `[N, C, H, W]` by the gate `[N, C, 1, 1]`."""
        if promise and x.dim() == 4 and gate.shape == (*x.shape[:2], 1, 1):
            return x.mul_(gate)
        return x * gate


def _largest(
    weight: Tensor, bias: Tensor | None, activation: str | None, x: float, residual: float = 0.0
) -> float:
    """What no value of the convolution, the sum and the activation exceeds."""
    products = weight.detach().double().abs().flatten(1).sum(1) * x
    sums = products if bias is None else products + bias.detach().double().abs()
    largest = float(sums.max()) + residual
    if not largest <= LARGEST_VALUE:
        return math.inf
    return min(largest, 6.0) if activation == "relu6" else largest


def _convolve(
    convolution: onednn.PackedConv2d,
    x: Tensor,
    padding: Sides,
    activation: str | None,
    promise: Promise,
) -> Tensor:
    finite = promise is Promise.FINITE
    if finite or activation is None or activation in onednn.FUSED_ACTIVATIONS:
        return convolution(x, padding, activation, finite=finite)
    return _IN_PLACE[activation](convolution(x, padding))


def _may_pack(x: Tensor, *tensors: Tensor | None) -> bool:
    return chosen_backend() == "auto" and onednn.usable(x, *[t for t in tensors if t is not None])


def _like(residual: Any, shape: Sequence[int], dtype: torch.dtype) -> bool:
    return isinstance(residual, Tensor) and residual.shape == shape and residual.dtype == dtype


def _joins_op(residual: Any, x: Tensor, shape: Sequence[int]) -> bool:
    """Whether an op can add the residual: no broadcasting, no promotion of dtypes."""
    return _like(residual, shape, x.dtype) and not is_autocasting(x)
