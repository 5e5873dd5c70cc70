"""Torch definitions of the three ops: the CPU path, and the truth that the kernels are held to.

Each function takes checked, normalised arguments (`sepconv.ops.arguments`) and is a plain
composition of ATen calls, so autograd, `torch.compile`, `torch.export`, ONNX and `vmap` see nothing
special in it. On a CPU everything in between is channels_last: a depthwise convolution of a
contiguous tensor is up to ten times slower there.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from sepconv.ops.layout import is_channels_last, memory_format, to_channels_last, to_layout

Pair = tuple[int, int]
Sides = tuple[int, int, int, int]

ACTIVATIONS = ("relu", "relu6", "silu", "hardswish", "gelu")


def output_size(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Pair,
    padding: Sides,
    dilation: Pair,
) -> Pair:
    """Height and width (P, Q) of a convolution's result; below 1 where the filter does not fit.

    >>> output_size((1, 8, 224, 224), (8, 1, 3, 3), (2, 2), (0, 1, 0, 1), (1, 1))
    (112, 112)
    """
    top, bottom, left, right = padding
    p = (x_shape[2] + top + bottom - dilation[0] * (weight_shape[2] - 1) - 1) // stride[0] + 1
    q = (x_shape[3] + left + right - dilation[1] * (weight_shape[3] - 1) - 1) // stride[1] + 1
    return p, q


def activate(z: Tensor, activation: str | None) -> Tensor:
    """Apply an activation by its name; `None` returns `z` itself. `gelu` is the exact (erf) one.

    >>> activate(torch.tensor([-1.0, 7.0]), "relu6")
    tensor([0., 6.])
    """
    if activation is None:
        return z
    if activation == "relu":
        return F.relu(z)
    if activation == "relu6":
        return F.relu6(z)
    if activation == "silu":
        return F.silu(z)
    if activation == "hardswish":
        return F.hardswish(z)
    return F.gelu(z)


def activation_backward(dy: Tensor, z: Tensor, activation: str | None) -> Tensor:
    """Gradient before an activation, from the gradient `dy` after it and its input `z`.

    For `relu` and `relu6` the activation's output serves as `z` just as well.
    """
    if activation is None:
        return dy
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(dy, z, 0)
    if activation == "relu6":
        return aten.hardtanh_backward(dy, z, 0.0, 6.0)
    if activation == "silu":
        if torch.is_grad_enabled():  # the fused operator has no derivative of its own
            sigmoid = z.sigmoid()
            return dy * sigmoid * (1 + z * (1 - sigmoid))
        return aten.silu_backward(dy, z)
    if activation == "hardswish":
        return aten.hardswish_backward(dy, z)
    return aten.gelu_backward(dy, z)


def depthwise_conv2d(
    x: Tensor,
    weight_dw: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Sides,
    dilation: Pair,
    activation: str | None,
) -> Tensor:
    """`activation(x * weight_dw + bias)`, each channel with its own filters."""
    x, channels_last = _computing_layout(x, weight_dw)
    x, even = _pad_unevenly(x, padding)
    y = activate(_depthwise(x, weight_dw, bias, stride, even, dilation), activation)
    return to_layout(y, channels_last)


def pointwise_conv2d(
    x: Tensor,
    weight_pw: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """`activation(x @ weight_pw + bias + residual)`, the channels of each pixel mixed."""
    x, channels_last = _computing_layout(x, weight_pw)
    y = _pointwise(x, weight_pw, bias)
    if residual is not None:
        y = y + residual
    return to_layout(activate(y, activation), channels_last)


def separable_conv2d(
    x: Tensor,
    weight_dw: Tensor,
    weight_pw: Tensor,
    bias_dw: Tensor | None,
    bias_pw: Tensor | None,
    stride: Pair,
    padding: Sides,
    dilation: Pair,
    activation_mid: str | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """The depthwise, then the pointwise convolution, with an activation after each."""
    x, channels_last = _computing_layout(x, weight_dw)
    channels_last = channels_last or is_channels_last(weight_pw)
    x, even = _pad_unevenly(x, padding)
    filters, channels = weight_dw.shape[0], x.shape[1]
    if filters == channels:
        z = _depthwise(x, weight_dw, bias_dw, stride, even, dilation)
        y = _pointwise(activate(z, activation_mid), weight_pw, bias_pw)
    else:
        multiplier = filters // channels
        # One filter per channel at a time: a group with several outputs leaves the fast path.
        sets = (
            activate(
                _depthwise(
                    x,
                    weight_dw[m::multiplier],
                    None if bias_dw is None else bias_dw[m::multiplier],
                    stride,
                    even,
                    dilation,
                ),
                activation_mid,
            )
            for m in range(multiplier)
        )
        y = _pointwise_of_sets(sets, weight_pw, bias_pw, multiplier)
    if residual is not None:
        y = y + residual
    return to_layout(activate(y, activation), channels_last)


def depthwise_conv2d_backward_input(
    dy: Tensor,
    weight_dw: Tensor,
    x_shape: Sequence[int],
    stride: Pair,
    padding: Sides,
    dilation: Pair,
    channels_last: bool,
) -> Tensor:
    """Gradient of `depthwise_conv2d` without bias and activation by its input."""
    n, c, h, w = x_shape
    top, bottom, left, right = padding
    padded = (n, c, h + top + bottom, w + left + right)
    if 0 in padded or dy.numel() == 0:
        return dy.new_zeros(n, c, h, w).contiguous(memory_format=memory_format(channels_last))
    dx = conv2d_input(padded, weight_dw, to_channels_last(dy), stride, 0, dilation, c)
    return to_layout(dx[:, :, top : top + h, left : left + w].contiguous(), channels_last)


def depthwise_conv2d_backward_weight(
    dy: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    stride: Pair,
    padding: Sides,
    dilation: Pair,
) -> Tensor:
    """Gradient of `depthwise_conv2d` without bias and activation by its filters."""
    if dy.numel() == 0 or x.numel() == 0:
        return dy.new_zeros(weight_shape)
    top, bottom, left, right = padding
    x = to_channels_last(F.pad(x, (left, right, top, bottom)))
    shape = torch.Size(weight_shape)
    dw = conv2d_weight(x, shape, to_channels_last(dy), stride, 0, dilation, x.shape[1])
    return dw.contiguous()


def _computing_layout(x: Tensor, weight: Tensor) -> tuple[Tensor, bool]:
    """The input as it is computed with, and whether the result is to be channels_last."""
    if is_channels_last(x):
        return x, True
    if x.is_cpu:
        return to_channels_last(x), is_channels_last(weight)
    return x, is_channels_last(weight)


def _pad_unevenly(x: Tensor, padding: Sides) -> tuple[Tensor, Pair]:
    """Leave even padding to the convolution, which knows no other kind."""
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def _depthwise(
    x: Tensor,
    weight_dw: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    if x.numel() == 0:
        top, left = padding
        size = output_size(x.shape, weight_dw.shape, stride, (top, top, left, left), dilation)
        return _sum_of_nothing((x.shape[0], weight_dw.shape[0], *size), x, weight_dw, bias)
    return F.conv2d(x, weight_dw, bias, stride, padding, dilation, x.shape[1])


def _pointwise(x: Tensor, weight_pw: Tensor, bias: Tensor | None) -> Tensor:
    if x.numel() == 0 or weight_pw.shape[0] == 0:
        shape = (x.shape[0], weight_pw.shape[0], *x.shape[2:])
        return _sum_of_nothing(shape, x, weight_pw, bias)
    return F.conv2d(x, weight_pw, bias)


def _sum_of_nothing(
    shape: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """What a convolution gives that has no product to add up; ATen refuses most such shapes."""
    zero = x[:0].sum() + weight[:0].sum()  # for their gradients' sake
    if bias is not None:
        zero = zero + bias.view(-1, 1, 1)
    return zero.expand(shape).contiguous()


def _pointwise_of_sets(
    sets: Iterator[Tensor], weight_pw: Tensor, bias: Tensor | None, multiplier: int
) -> Tensor:
    """Pointwise convolution of channels that come in sets: all first filters, all second, ..."""
    filters, channels = weight_pw.shape[:2]
    weight = weight_pw.reshape(filters, channels // multiplier, multiplier)  # [K, C, M]
    if weight_pw.dtype not in (torch.float32, torch.float64):
        # Partial sums would be rounded to 16 bits.
        weight = weight.transpose(1, 2).reshape(weight_pw.shape)
        return _pointwise(torch.cat(list(sets), 1), weight, bias)

    first, *rest = weight.permute(2, 1, 0).contiguous()  # each [C, K]
    pixels = next(sets).permute(0, 2, 3, 1)  # [N, P, Q, C]
    flat = pixels.flatten(0, 2)
    y = torch.mm(flat, first) if bias is None else torch.addmm(bias, flat, first)
    for weight_of_set in rest:
        flat = next(sets).permute(0, 2, 3, 1).flatten(0, 2)
        y = torch.addmm(y, flat, weight_of_set)
    return y.view(*pixels.shape[:3], filters).permute(0, 3, 1, 2)
