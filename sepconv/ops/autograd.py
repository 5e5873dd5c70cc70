"""Gradients of the registered operators, made of registered operators: differentiable again.

The separable convolution saves its arguments and its result, never the depthwise half, which the
backward pass recomputes: that costs one depthwise convolution and spares a tensor M times the
input's size. The pointwise gradients are matrix products, which torch has already.

An activation is differentiated at its output where that is enough (relu, relu6). The others need
their input: where gradients are wanted the operator runs without its last activation, which is
applied to what it returns, and both are outputs of the node in the graph.
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

from sepconv.ops.activation_gradients import before_activation
from sepconv.ops.autocast import is_autocasting
from sepconv.ops.layout import suggests_channels_last
from sepconv.ops.library import LIBRARY
from sepconv.ops.reference import activate

Gradient = Tensor | None
# Of an operator: the gradients of its arguments from those of its outputs.
Backward = Callable[..., tuple[Gradient, ...]]


def needs_input(activation: str | None) -> bool:
    """Whether an activation's gradient takes its input; for the others its output will do."""
    return activation not in (None, "relu", "relu6")


def _setup_depthwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_dw, _, *geometry, activation = inputs
    ctx.save_for_backward(x, weight_dw, output if activation else None)
    ctx.geometry, ctx.activation = geometry, activation


def _before_last_activation(
    ctx: Any, dy: Gradient, also: Gradient, y: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Gradient]:
    """`before_activation`, plus `also`: what a second differentiation adds to dz."""
    if also is None:
        assert dy is not None
        return before_activation(dy, y, ctx.activation, needs_bias)
    dz = also if dy is None else also + before_activation(dy, y, ctx.activation, False)[0]
    return dz, torch.ops.sepconv.channel_sum(dz) if needs_bias else None


def _depthwise_backward(ctx: Any, dy: Gradient, also: Gradient = None) -> tuple[Gradient, ...]:
    x, weight_dw, y = ctx.saved_tensors
    _, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    dz, dbias = _before_last_activation(ctx, dy, also, y, needs_bias)
    dx, dweight = depthwise_gradients(dz, x, weight_dw, ctx.geometry, (needs_x, needs_weight))
    return dx, dweight, dbias, None, None, None, None


def _setup_pointwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_pw, _, activation, _ = inputs
    ctx.save_for_backward(x, weight_pw, output if activation else None)
    ctx.activation = activation


def _pointwise_backward(ctx: Any, dy: Gradient, also: Gradient = None) -> tuple[Gradient, ...]:
    x, weight_pw, y = ctx.saved_tensors
    _, needs_x, needs_weight, needs_bias, _, needs_residual = ctx.needs_input_grad
    dz, dbias = _before_last_activation(ctx, dy, also, y, needs_bias)
    dx, dweight = pointwise_gradients(dz, x, weight_pw, (needs_x, needs_weight))
    return dx, dweight, dbias, None, dz if needs_residual else None


def _setup_separable(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_dw, weight_pw, bias_dw, _, *geometry, mid, activation, _ = inputs
    ctx.save_for_backward(x, weight_dw, weight_pw, bias_dw, output if activation else None)
    ctx.geometry, ctx.activation_mid, ctx.activation = geometry, mid, activation


def _separable_backward(ctx: Any, dy: Gradient, also: Gradient = None) -> tuple[Gradient, ...]:
    x, weight_dw, weight_pw, bias_dw, y = ctx.saved_tensors
    _, needs_x, needs_dw, needs_pw, needs_bias_dw, needs_bias_pw, *_, needs_residual = (
        ctx.needs_input_grad
    )
    needs_depthwise = (needs_x, needs_dw, needs_bias_dw)

    dz, dbias_pw = _before_last_activation(ctx, dy, also, y, needs_bias_pw)

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
    op: Any,
    setup_context: Callable[..., None],
    backward: Backward,
    activation_at: int | None = None,
) -> Callable[..., Any]:
    """The operator's kernel for the dispatcher's Autograd key.

    As `torch.library.register_autograd` makes it, except that `torch.func.grad` works: its layers
    wrap and unwrap below the Autograd key, so the function may be applied at a single level.

    Args:
        op: The operator.
        setup_context: Saves what the backward pass needs, from the arguments and the output.
        backward: Takes the context and the outputs' gradients.
        activation_at: Which argument is the activation at the end. One that is differentiated at
            its input is applied behind the operator, whose output is then that input.
    """

    def run(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            activation = None if activation_at is None else args[activation_at]
            applied = [*args]
            if activation_at is not None and needs_input(activation):
                applied[activation_at] = None
            # A function's forward runs without gradients; the levels of `torch.func` below this
            # one record their own.
            with torch.set_grad_enabled(torch._C._are_functorch_transforms_active()):
                output = run(keyset, *applied)
                setup_context(ctx, args, output)
                if not needs_input(activation):
                    return output
                # What is saved must be an output, or it could not be differentiated again.
                ctx.set_materialize_grads(False)
                with torch._C._AutoDispatchBelowAutograd():
                    return activate(output, activation), output

        @staticmethod
        def backward(ctx: Any, *gradients: Gradient) -> Any:
            like = next((g for g in gradients if g is not None), None)
            if like is None:
                return (None,) * len(ctx.needs_input_grad)
            # In the dtype of the forward pass, also where `backward()` is called under autocast.
            autocasting = is_autocasting(like)
            with torch.autocast(like.device.type, enabled=False) if autocasting else nullcontext():
                return None, *backward(ctx, *gradients)

    apply_single_level = super(torch.autograd.Function, Function).apply

    def kernel(keyset: Any, *args: Any) -> Any:
        _refuse_tangents(op, args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return run(keyset, *args)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                outputs = apply_single_level(keyset, *args)
        else:
            outputs = Function.apply(keyset, *args)
        if activation_at is not None and needs_input(args[activation_at]):
            return outputs[0]
        return outputs

    return kernel


for _name, _setup, _backward, _activation_at in (
    ("depthwise_conv2d", _setup_depthwise, _depthwise_backward, 6),
    ("pointwise_conv2d", _setup_pointwise, _pointwise_backward, 3),
    ("separable_conv2d", _setup_separable, _separable_backward, 9),
    ("depthwise_conv2d_backward_input", _setup_backward_input, _backward_input_backward, None),
    ("depthwise_conv2d_backward_weight", _setup_backward_weight, _backward_weight_backward, None),
):
    _op = getattr(torch.ops.sepconv, _name).default
    LIBRARY.impl(
        _name, differentiable(_op, _setup, _backward, _activation_at), "Autograd", with_keyset=True
    )
