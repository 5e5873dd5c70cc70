"""One function per launcher: the call, run by what tuning chose for it.

Each takes the launcher's arguments and the memory format of its result. `choice` is for the tuner,
which compares them; without it the choice is looked up.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sepconv.kernels.geometry import Geometry
from sepconv.ops import reference
from sepconv.ops.choice import Problem, lookup
from sepconv.ops.choice_files import Choice
from sepconv.ops.kernel_modules import kernel_module
from sepconv.ops.layout import is_channels_last, memory_format, to_layout

_PLAIN = Geometry()
# Not a choice: ask for one.
ASK: Literal["ask"] = "ask"


def allows_tf32() -> bool:
    """Whether the user lets float32 convolutions use TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def depthwise(
    x: Tensor,
    weight_dw: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: str | None,
    channels_last: bool,
    choice: Choice = ASK,
) -> Tensor:
    """`depthwise_fwd`."""
    if choice == ASK:
        epilogue = bias is not None or activation is not None
        choice = _depthwise_choice(x, weight_dw, geometry, channels_last, epilogue)
    if choice == "library":
        y = reference.depthwise_conv2d(x, weight_dw, bias, geometry, activation)
        return to_layout(y, channels_last)
    return kernel_module("depthwise").depthwise_fwd(
        x, weight_dw, bias, geometry, activation, channels_last=channels_last, config=choice
    )


def pointwise(
    x: Tensor,
    weight_pw: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    channels_last: bool,
    choice: Choice = ASK,
) -> Tensor:
    """`pointwise_fwd`."""
    if choice == ASK:
        epilogue = bias is not None or activation is not None or residual is not None
        choice = _pointwise_choice(x, weight_pw, channels_last, epilogue)
    if choice == "linear":
        y = _linear(x, weight_pw, bias, activation, residual)
        return to_layout(y, channels_last)
    if choice == "library":
        y = reference.pointwise_conv2d(x, weight_pw, bias, activation, residual)
        return to_layout(y, channels_last)
    return kernel_module("pointwise").pointwise_fwd(
        x,
        weight_pw,
        bias,
        activation,
        residual,
        allow_tf32=_allows_tf32_for(x),
        channels_last=channels_last,
        config=choice,
    )


def _linear(
    x: Tensor,
    weight_pw: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """A pointwise convolution as the library's matrix product, channels_last.

    On a GPU that is cuBLASLt, which adds a bias and applies a ReLU before it writes.
    """
    N, C, P, Q = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(-1, C)
    weight = weight_pw.flatten(1).t()
    if bias is not None and activation == "relu" and residual is None:
        y, activation = torch._addmm_activation(bias, pixels, weight), None
    else:
        y = torch.mm(pixels, weight) if bias is None else torch.addmm(bias, pixels, weight)
    y = y.view(N, P, Q, -1).permute(0, 3, 1, 2)
    return reference.activate(y if residual is None else y + residual, activation)


def _depthwise_choice(
    x: Tensor, weight_dw: Tensor, geometry: Geometry, channels_last: bool, epilogue: bool
) -> Choice:
    G, _, R, S = weight_dw.shape
    sizes = (x.shape, (G, R, S), G, geometry)
    return lookup(
        Problem("depthwise_fwd", x.dtype, x.get_device(), *sizes, channels_last, False, epilogue)
    )


def _pointwise_choice(x: Tensor, weight_pw: Tensor, channels_last: bool, epilogue: bool) -> Choice:
    K, C = weight_pw.shape[:2]
    sizes = (x.shape, (C, 1, 1), K, _PLAIN)
    return lookup(
        Problem(
            "pointwise_fwd",
            x.dtype,
            x.get_device(),
            *sizes,
            channels_last,
            _allows_tf32_for(x),
            epilogue,
        )
    )


def _allows_tf32_for(x: Tensor) -> bool:
    return x.dtype == torch.float32 and allows_tf32()


def depthwise_statistics(
    x: Tensor,
    weight_dw: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`depthwise_fwd_statistics`, by the choice for `depthwise_fwd`."""
    choice = _depthwise_choice(x, weight_dw, geometry, channels_last, bias is not None)
    if choice == "library":
        return with_statistics(depthwise(x, weight_dw, bias, geometry, None, channels_last))
    return kernel_module("depthwise").depthwise_fwd_statistics(
        x, weight_dw, bias, geometry, channels_last=channels_last, config=choice
    )


def pointwise_statistics(
    x: Tensor, weight_pw: Tensor, bias: Tensor | None, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`pointwise_fwd_statistics`, by the choice for `pointwise_fwd`."""
    choice = _pointwise_choice(x, weight_pw, channels_last, bias is not None)
    if choice in ("library", "linear"):
        return with_statistics(pointwise(x, weight_pw, bias, None, None, channels_last))
    return kernel_module("pointwise").pointwise_fwd_statistics(
        x,
        weight_pw,
        bias,
        allow_tf32=_allows_tf32_for(x),
        channels_last=channels_last,
        config=choice,
    )


def with_statistics(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`y` with the mean and the biased variance of each channel, at least in float32."""
    wide = y if y.dtype == torch.float64 else y.float()
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return y, mean, var


def separable(
    x: Tensor,
    weight_dw: Tensor,
    weight_pw: Tensor,
    bias_dw: Tensor | None,
    bias_pw: Tensor | None,
    geometry: Geometry,
    activation_mid: str | None,
    activation: str | None,
    residual: Tensor | None,
    channels_last: bool,
    choice: Choice = ASK,
) -> Tensor:
    """`separable_fwd`, or the two convolutions one after the other."""
    tf32 = _allows_tf32_for(x)
    if choice == ASK:
        G, _, R, S = weight_dw.shape
        mid = bias_dw is not None or activation_mid is not None
        epilogue = bias_pw is not None or activation is not None or residual is not None
        sizes = (x.shape, (G, R, S), weight_pw.shape[0], geometry)
        choice = lookup(
            Problem(
                "separable_fwd", x.dtype, x.get_device(), *sizes, channels_last, tf32, epilogue, mid
            )
        )
    if choice == "unfused":
        middle = depthwise(x, weight_dw, bias_dw, geometry, activation_mid, channels_last)
        return pointwise(middle, weight_pw, bias_pw, activation, residual, channels_last)
    weights = (weight_dw, weight_pw, bias_dw, bias_pw)
    return kernel_module("separable").separable_fwd(
        x,
        *weights,
        geometry,
        activation_mid,
        activation,
        residual,
        allow_tf32=tf32,
        channels_last=channels_last,
        config=choice,
    )


def activation_bwd(
    dy: Tensor,
    z: Tensor,
    activation: str,
    bias: bool,
    channels_last: bool,
    choice: Choice = ASK,
) -> tuple[Tensor, Tensor | None]:
    """`activation_bwd`: the gradient before an activation, and of the bias there if wanted."""
    if choice == ASK:
        C = dy.shape[1]
        sizes = (dy.shape, (C, 1, 1), C, _PLAIN)
        choice = lookup(
            Problem("activation_bwd", dy.dtype, dy.get_device(), *sizes, channels_last, False, bias)
        )
    if choice == "library":
        dz = reference.activation_backward(dy, z, activation)
        dbias = dz.sum((0, 2, 3)) if bias else None
        if not dz.is_contiguous(memory_format=memory_format(channels_last)):
            dz = to_layout(dz.contiguous(), channels_last)
        return dz, dbias
    return kernel_module("activation_bwd").activation_bwd(
        dy, z, activation, bias=bias, channels_last=channels_last, config=choice
    )


def depthwise_bwd_input(
    dy: Tensor,
    weight_dw: Tensor,
    x_shape: tuple[int, int, int, int],
    geometry: Geometry,
    channels_last: bool,
    choice: Choice = ASK,
) -> Tensor:
    """`depthwise_bwd_input`."""
    if choice == ASK:
        G, _, R, S = weight_dw.shape
        sizes = (x_shape, (G, R, S), G, geometry)
        choice = lookup(
            Problem("depthwise_bwd_input", dy.dtype, dy.get_device(), *sizes, channels_last)
        )
    if choice == "library":
        return reference.depthwise_conv2d_backward_input(
            dy, weight_dw, x_shape, geometry, channels_last
        )
    return kernel_module("depthwise_bwd_input").depthwise_bwd_input(
        dy, weight_dw, x_shape, geometry, channels_last=channels_last, config=choice
    )


def depthwise_bwd_weight(
    dy: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    geometry: Geometry,
    choice: Choice = ASK,
) -> Tensor:
    """`depthwise_bwd_weight`; never the library's, which may differ from call to call."""
    if choice == ASK:
        G, _, R, S = weight_shape
        sizes = (x.shape, (G, R, S), G, geometry)
        choice = lookup(
            Problem("depthwise_bwd_weight", dy.dtype, dy.get_device(), *sizes, is_channels_last(x))
        )
    return kernel_module("depthwise_bwd_weight").depthwise_bwd_weight(
        dy, x, tuple(weight_shape), geometry, config=choice
    )
