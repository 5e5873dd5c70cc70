"""The kernels as operators of torch: `torch.ops.sepconv.*`, opaque to its compilers.

Here are the schemas, what runs on real tensors, and what fake tensors are told. `autograd`,
`batching` and `flops` add the rest; `activation_gradients` and `batch_norm` have operators of their
own.

On a GPU, and in Triton's interpreter, the kernels run; elsewhere torch's own operators, so that the
registration can be checked on any machine. `torch.library.Library` rather than `custom_op`, whose
call costs about twice as much.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.geometry import Geometry
from sepconv.ops import reference, run
from sepconv.ops.arguments import check_depthwise, check_pointwise, check_separable, pair
from sepconv.ops.backend import can_run_kernels
from sepconv.ops.layout import is_channels_last, memory_format, suggests_channels_last

LIBRARY = torch.library.Library("sepconv", "DEF")

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
GEOMETRY_SCHEMA = "int[2] stride, int[4] padding, int[2] dilation"

_SCHEMAS = (
    "depthwise_conv2d(Tensor x, Tensor weight_dw, Tensor? bias, "
    f"{GEOMETRY_SCHEMA}, str? activation) -> Tensor",
    "pointwise_conv2d(Tensor x, Tensor weight_pw, Tensor? bias, str? activation, "
    "Tensor? residual) -> Tensor",
    "separable_conv2d(Tensor x, Tensor weight_dw, Tensor weight_pw, Tensor? bias_dw, "
    f"Tensor? bias_pw, {GEOMETRY_SCHEMA}, str? activation_mid, str? activation, "
    "Tensor? residual) -> Tensor",
    "depthwise_conv2d_backward_input(Tensor dy, Tensor weight_dw, SymInt[4] x_shape, "
    f"{GEOMETRY_SCHEMA}, bool channels_last) -> Tensor",
    "depthwise_conv2d_backward_weight(Tensor dy, Tensor x, SymInt[4] weight_shape, "
    f"{GEOMETRY_SCHEMA}) -> Tensor",
)
for _schema in _SCHEMAS:
    LIBRARY.define(_schema, tags=TAGS)


def normalised(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Geometry:
    """The dispatcher's lists as the tuples that the public functions make and check."""
    (top, bottom), (left, right) = (pair("padding", p, least=0) for p in (padding[:2], padding[2:]))
    return Geometry(pair("stride", stride), (top, bottom, left, right), pair("dilation", dilation))


def real(name: str) -> Callable[..., Any]:
    """Register what runs an operator on real tensors."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


def fake(name: str) -> Callable[..., Any]:
    """Register what fake tensors are told about an operator."""
    return torch.library.register_fake(f"sepconv::{name}", lib=LIBRARY)


def empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """An uninitialised tensor like another, of a shape and in a layout of its own."""
    return torch.empty(
        shape,
        dtype=like.dtype,
        device=like.device,
        memory_format=memory_format(channels_last),
    )


@real("depthwise_conv2d")
def _depthwise(
    x: Tensor,
    weight_dw: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None,
) -> Tensor:
    arguments = (x, weight_dw, bias, normalised(stride, padding, dilation), activation)
    check_depthwise(*arguments)
    if not can_run_kernels(x):
        return reference.depthwise_conv2d(*arguments)
    channels_last = suggests_channels_last(x, weight_dw)
    return run.depthwise(*arguments, channels_last)


@fake("depthwise_conv2d")
def _fake_depthwise(
    x: Tensor,
    weight_dw: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None,
) -> Tensor:
    geometry = normalised(stride, padding, dilation)
    shape = check_depthwise(x, weight_dw, bias, geometry, activation)
    return empty(x, shape, suggests_channels_last(x, weight_dw))


@real("pointwise_conv2d")
def _pointwise(
    x: Tensor,
    weight_pw: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    check_pointwise(x, weight_pw, bias, activation, residual)
    if not can_run_kernels(x):
        return reference.pointwise_conv2d(x, weight_pw, bias, activation, residual)
    channels_last = suggests_channels_last(x, weight_pw)
    return run.pointwise(x, weight_pw, bias, activation, residual, channels_last)


@fake("pointwise_conv2d")
def _fake_pointwise(x: Tensor, weight_pw: Tensor, *rest: Any) -> Tensor:
    shape = check_pointwise(x, weight_pw, *rest)
    return empty(x, shape, suggests_channels_last(x, weight_pw))


def _separable_channels_last(x: Tensor, weight_dw: Tensor, weight_pw: Tensor) -> bool:
    return suggests_channels_last(x, weight_dw) or is_channels_last(weight_pw)


@real("separable_conv2d")
def _separable(
    x: Tensor,
    weight_dw: Tensor,
    weight_pw: Tensor,
    bias_dw: Tensor | None,
    bias_pw: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation_mid: str | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    arguments = (
        x,
        weight_dw,
        weight_pw,
        bias_dw,
        bias_pw,
        normalised(stride, padding, dilation),
        activation_mid,
        activation,
        residual,
    )
    check_separable(*arguments)
    if not can_run_kernels(x):
        return reference.separable_conv2d(*arguments)
    return run.separable(*arguments, _separable_channels_last(x, weight_dw, weight_pw))


@fake("separable_conv2d")
def _fake_separable(
    x: Tensor,
    weight_dw: Tensor,
    weight_pw: Tensor,
    bias_dw: Tensor | None,
    bias_pw: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation_mid: str | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    tensors = (x, weight_dw, weight_pw, bias_dw, bias_pw)
    geometry = normalised(stride, padding, dilation)
    shape = check_separable(*tensors, geometry, activation_mid, activation, residual)
    return empty(x, shape, _separable_channels_last(x, weight_dw, weight_pw))


@real("depthwise_conv2d_backward_input")
def _depthwise_backward_input(
    dy: Tensor,
    weight_dw: Tensor,
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
) -> Tensor:
    n, c, h, w = x_shape
    arguments = (dy, weight_dw, (n, c, h, w), normalised(stride, padding, dilation))
    if not can_run_kernels(dy):
        return reference.depthwise_conv2d_backward_input(*arguments, channels_last)
    return run.depthwise_bwd_input(*arguments, channels_last)


@fake("depthwise_conv2d_backward_input")
def _fake_depthwise_backward_input(
    dy: Tensor,
    weight_dw: Tensor,
    x_shape: Sequence[int],
    _stride: Sequence[int],
    _padding: Sequence[int],
    _dilation: Sequence[int],
    channels_last: bool,
) -> Tensor:
    return empty(dy, x_shape, channels_last)


@real("depthwise_conv2d_backward_weight")
def _depthwise_backward_weight(
    dy: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    arguments = (dy, x, tuple(weight_shape), normalised(stride, padding, dilation))
    if not can_run_kernels(dy):
        return reference.depthwise_conv2d_backward_weight(*arguments)
    return run.depthwise_bwd_weight(*arguments)


@fake("depthwise_conv2d_backward_weight")
def _fake_depthwise_backward_weight(
    dy: Tensor, x: Tensor, weight_shape: Sequence[int], *_others: Sequence[int]
) -> Tensor:
    return dy.new_empty(weight_shape)


LIBRARY.define("refuse(Tensor x, str message, SymInt[4] shape) -> Tensor", tags=TAGS)


@real("refuse")
def _refuse(x: Tensor, message: str, shape: Sequence[int]) -> Tensor:
    raise ValueError(message)


@fake("refuse")
def _fake_refuse(x: Tensor, message: str, shape: Sequence[int]) -> Tensor:
    return x.new_empty(shape)


def refused(error: ValueError, x: Tensor, weight: Tensor) -> Tensor:
    """Raise `error`, where torch.compile traces the call from the compiled code.

    With `fullgraph=True` whatever is raised while tracing becomes an error of torch's own. An
    operator that raises when it runs keeps it a `ValueError`. What follows is traced with a result
    of a likely shape.
    """
    # Not `is_exporting()`, which is always true while torch 2.11 traces.
    tracing = torch.compiler.is_dynamo_compiling() and not torch.compiler._is_exporting_flag
    if not (tracing and isinstance(x, Tensor)):
        raise error
    shape = (1, 1, 1, 1)
    if isinstance(weight, Tensor) and x.dim() == weight.dim() == 4:
        shape = (x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    return torch.ops.sepconv.refuse(x, str(error), shape)
