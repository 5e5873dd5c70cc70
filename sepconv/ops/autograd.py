"""Gradients of the registered operators, made of registered operators: differentiable again.

The separable convolution saves its arguments and its result, never the depthwise half, which the
backward pass recomputes: that costs one depthwise convolution and spares a tensor M times the
input's size. The pointwise gradients are matrix products, which torch has already.

An activation is differentiated at its output where that is enough (relu, relu6). The others need
their input: the public functions apply those outside the operator when gradients are wanted; the
operator itself, called directly, computes that input again.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch.autograd import forward_ad

from sepconv.layout import suggests_channels_last
from sepconv.ops.activation_gradients import before_activation
from sepconv.ops.autocast import is_autocasting
from sepconv.ops.library import LIBRARY
from sepconv.reference import activate

Gradient = Tensor | None
Backward = Callable[[Any, Tensor], tuple[Gradient, ...]]


def needs_input(activation: str | None) -> bool:
    """Whether an activation's gradient takes its input; for the others its output will do."""
    return activation not in (None, "relu", "relu6")


def split_activation(
    activation: str | None, *tensors: Tensor | None
) -> tuple[str | None, str | None]:
    """The activation to fuse into an operator on these tensors, and the one to apply after it.

    Fused unless its gradient will be wanted and takes its input, which autograd then keeps.
    """
    wants_gradients = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )
    if wants_gradients and needs_input(activation):
        return None, activation
    return activation, None


def _setup_depthwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_dw, bias, *geometry, activation = inputs
    ctx.save_for_backward(x, weight_dw, bias, output if activation else None)
    ctx.geometry, ctx.activation = geometry, activation


def _depthwise_backward(ctx: Any, dy: Tensor) -> tuple[Gradient, ...]:
    x, weight_dw, bias, y = ctx.saved_tensors
    if needs_input(ctx.activation):
        y = torch.ops.sepconv.depthwise_conv2d(x, weight_dw, bias, *ctx.geometry, None)
    _, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    dz, dbias = before_activation(dy, y, ctx.activation, needs_bias)
    dx, dweight = depthwise_gradients(dz, x, weight_dw, ctx.geometry, (needs_x, needs_weight))
    return dx, dweight, dbias, None, None, None, None


def _setup_pointwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_pw, bias, activation, residual = inputs
    recomputed = needs_input(activation)
    ctx.save_for_backward(
        x,
        weight_pw,
        bias if recomputed else None,
        residual if recomputed else None,
        output if activation and not recomputed else None,
    )
    ctx.activation = activation


def _pointwise_backward(ctx: Any, dy: Tensor) -> tuple[Gradient, ...]:
    x, weight_pw, bias, residual, y = ctx.saved_tensors
    if needs_input(ctx.activation):
        y = torch.ops.sepconv.pointwise_conv2d(x, weight_pw, bias, None, residual)
    _, needs_x, needs_weight, needs_bias, _, needs_residual = ctx.needs_input_grad
    dz, dbias = before_activation(dy, y, ctx.activation, needs_bias)
    dx, dweight = pointwise_gradients(dz, x, weight_pw, (needs_x, needs_weight))
    return dx, dweight, dbias, None, dz if needs_residual else None


def _setup_separable(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_dw, weight_pw, bias_dw, bias_pw, *geometry, mid, activation, residual = inputs
    recomputed = needs_input(activation)
    ctx.save_for_backward(
        x,
        weight_dw,
        weight_pw,
        bias_dw,
        bias_pw if recomputed else None,
        residual if recomputed else None,
        output if activation and not recomputed else None,
    )
    ctx.geometry, ctx.activation_mid, ctx.activation = geometry, mid, activation


def _separable_backward(ctx: Any, dy: Tensor) -> tuple[Gradient, ...]:
    x, weight_dw, weight_pw, bias_dw, bias_pw, residual, y = ctx.saved_tensors
    _, needs_x, needs_dw, needs_pw, needs_bias_dw, needs_bias_pw, *_, needs_residual = (
        ctx.needs_input_grad
    )
    needs_depthwise = (needs_x, needs_dw, needs_bias_dw)

    if needs_input(ctx.activation):
        y = torch.ops.sepconv.separable_conv2d(
            x,
            weight_dw,
            weight_pw,
            bias_dw,
            bias_pw,
            *ctx.geometry,
            ctx.activation_mid,
            None,
            residual,
        )
    dz, dbias_pw = before_activation(dy, y, ctx.activation, needs_bias_pw)

    middle: Any = None
    z: Any = None
    if needs_pw or (ctx.activation_mid and any(needs_depthwise)):
        late = ctx.activation_mid if needs_input(ctx.activation_mid) else None
        early = None if late else ctx.activation_mid
        z = torch.ops.sepconv.depthwise_conv2d(x, weight_dw, bias_dw, *ctx.geometry, early)
        middle = activate(z, late)
    dmiddle, dweight_pw = pointwise_gradients(
        dz, middle, weight_pw, (any(needs_depthwise), needs_pw)
    )

    dx = dweight_dw = dbias_dw = None
    if dmiddle is not None:
        dz_dw, dbias_dw = before_activation(dmiddle, z, ctx.activation_mid, needs_bias_dw)
        dx, dweight_dw = depthwise_gradients(dz_dw, x, weight_dw, ctx.geometry, (needs_x, needs_dw))
    no_gradients = (None,) * 5
    return (
        *(dx, dweight_dw, dweight_pw, dbias_dw, dbias_pw),
        *no_gradients,
        dz if needs_residual else None,
    )


def _setup_backward_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, weight_dw, _, *geometry, _ = inputs
    ctx.save_for_backward(dy, weight_dw)
    ctx.geometry = geometry


def _backward_input_backward(ctx: Any, ddx: Tensor) -> tuple[Gradient, ...]:
    """The input's gradient is linear in `dy` and in the filters, so its own is one of each."""
    dy, weight_dw = ctx.saved_tensors
    needs_dy, needs_weight = ctx.needs_input_grad[1:3]
    d_dy = dweight = None
    if needs_dy:
        d_dy = torch.ops.sepconv.depthwise_conv2d(ddx, weight_dw, None, *ctx.geometry, None)
    if needs_weight:
        dweight = torch.ops.sepconv.depthwise_conv2d_backward_weight(
            dy, ddx, weight_dw.shape, *ctx.geometry
        )
    return d_dy, dweight, None, None, None, None, None


def _setup_backward_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, _, *geometry = inputs
    ctx.save_for_backward(dy, x)
    ctx.geometry = geometry


def _backward_weight_backward(ctx: Any, ddweight: Tensor) -> tuple[Gradient, ...]:
    dy, x = ctx.saved_tensors
    needs_dy, needs_x = ctx.needs_input_grad[1:3]
    d_dy = dx = None
    if needs_dy:
        d_dy = torch.ops.sepconv.depthwise_conv2d(x, ddweight, None, *ctx.geometry, None)
    if needs_x:
        dx = _backward_input(dy, ddweight, x, ctx.geometry)
    return d_dy, dx, None, None, None, None


def _backward_input(dy: Tensor, weight_dw: Tensor, x: Tensor, geometry: list[Any]) -> Tensor:
    return torch.ops.sepconv.depthwise_conv2d_backward_input(
        dy, weight_dw, x.shape, *geometry, suggests_channels_last(x, weight_dw)
    )


def depthwise_gradients(
    dz: Tensor, x: Tensor, weight_dw: Tensor, geometry: list[Any], needs: tuple[bool, bool]
) -> tuple[Gradient, Gradient]:
    """Gradients by input and filters of a depthwise convolution, those that are needed."""
    needs_x, needs_weight = needs
    dx = dweight = None
    if needs_x:
        dx = _backward_input(dz, weight_dw, x, geometry)
    if needs_weight:
        dweight = torch.ops.sepconv.depthwise_conv2d_backward_weight(
            dz, x, weight_dw.shape, *geometry
        )
    return dx, dweight


def pointwise_gradients(
    dz: Tensor, x: Tensor | None, weight_pw: Tensor, needs: tuple[bool, bool]
) -> tuple[Gradient, Gradient]:
    """Gradients by input and weights of a pointwise convolution, those that are needed.

    The input `x` may be None where the weights need no gradient.
    """
    needs_x, needs_weight = needs
    dx = dweight = None
    weight = weight_pw.flatten(1)  # [K, C]
    pixels = dz.permute(0, 2, 3, 1)  # [N, P, Q, K]
    if needs_x:
        dx = (pixels @ weight).permute(0, 3, 1, 2)
    if needs_weight:
        assert x is not None
        # Not `flatten`, for which batched gradients (`is_grads_batched=True`) have no rule.
        rows = dz.shape[0] * dz.shape[2] * dz.shape[3]
        flat = x.permute(0, 2, 3, 1).reshape(rows, weight.shape[1])
        dweight = (pixels.reshape(rows, weight.shape[0]).t() @ flat).view(weight_pw.shape)
    return dx, dweight


def _refuse_tangents(op: Any, args: tuple[Any, ...]) -> None:
    """Raise where forward-mode differentiation would otherwise lose the tangents in silence."""
    if forward_ad._current_level < 0:
        return
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(
                f"{op}: no forward-mode derivative; with sepconv.backend('reference') there is one"
            )


def differentiable(
    op: Any, setup_context: Callable[..., None], backward: Backward
) -> Callable[..., Any]:
    """The operator's kernel for the dispatcher's Autograd key.

    As `torch.library.register_autograd` makes it, except that `torch.func.grad` works: its layers
    wrap and unwrap below the Autograd key, so the function may be applied at a single level.
    """

    def redispatch(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            # A function's forward runs without gradients; the levels of `torch.func` below this
            # one record their own.
            with torch.set_grad_enabled(torch._C._are_functorch_transforms_active()):
                output = redispatch(keyset, *args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Any:
            # Of several outputs only the first is differentiable.
            # In the dtype of the forward pass, also where `backward()` is called under autocast.
            autocasting = is_autocasting(dy)
            with torch.autocast(dy.device.type, enabled=False) if autocasting else nullcontext():
                return None, *backward(ctx, dy)

    apply_single_level = super(torch.autograd.Function, Function).apply

    def kernel(keyset: Any, *args: Any) -> Any:
        _refuse_tangents(op, args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return redispatch(keyset, *args)
        if not torch._C._are_functorch_transforms_active():
            return Function.apply(keyset, *args)
        with enable_single_level_autograd_function():
            return apply_single_level(keyset, *args)

    return kernel


for _name, _setup, _backward in (
    ("depthwise_conv2d", _setup_depthwise, _depthwise_backward),
    ("pointwise_conv2d", _setup_pointwise, _pointwise_backward),
    ("separable_conv2d", _setup_separable, _separable_backward),
    ("depthwise_conv2d_backward_input", _setup_backward_input, _backward_input_backward),
    ("depthwise_conv2d_backward_weight", _setup_backward_weight, _backward_weight_backward),
):
    _op = getattr(torch.ops.sepconv, _name).default
    LIBRARY.impl(_name, differentiable(_op, _setup, _backward), "Autograd", with_keyset=True)
