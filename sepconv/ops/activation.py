"""The gradient before an activation, and of the bias there, in one pass.

Where gradients of the gradients are wanted, the operators are the ATen calls they stand for, which
autograd knows; else one kernel reads `dy` and `z` and writes `dz` and the sums.
"""

from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.geometry import Geometry
from sepconv.ops import reference
from sepconv.ops.backend import can_run_kernels
from sepconv.ops.choice import ASK, Problem, lookup
from sepconv.ops.choice_files import Choice
from sepconv.ops.kernel_modules import kernel_module
from sepconv.ops.layout import memory_format, suggests_channels_last, to_layout
from sepconv.ops.registry import (
    Gradient,
    batch_as_channels,
    composite_where_differentiated,
    define,
    empty,
)

_AXES = (0, 2, 3)


def before_activation(
    dy: Tensor, z: Tensor | None, activation: str | None, needs_bias: bool
) -> tuple[Tensor, Gradient]:
    """Gradient before an activation, and of the bias there if it is needed.

    Args:
        dy: Gradient after the activation, [N, C, H, W].
        z: The activation's input, for relu and relu6 its output; None without an activation.
        activation: By its name, or None.
        needs_bias: Whether the bias gradient [C] is needed.
    """
    if activation is None:
        return dy, torch.ops.sepconv.channel_sum(dy) if needs_bias else None
    dz, dbias = torch.ops.sepconv.activation_backward(dy, z, activation, needs_bias)
    return dz, dbias if needs_bias else None


def before_last_activation(
    ctx: Any, dy: Gradient, also: Gradient, y: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Gradient]:
    """`before_activation`, plus `also`: what a second differentiation adds to dz."""
    if also is None:
        assert dy is not None
        return before_activation(dy, y, ctx.activation, needs_bias)
    dz = also if dy is None else also + before_activation(dy, y, ctx.activation, False)[0]
    return dz, torch.ops.sepconv.channel_sum(dz) if needs_bias else None


def run_bwd(
    dy: Tensor, z: Tensor, activation: str, bias: bool, channels_last: bool, choice: Choice = ASK
) -> tuple[Tensor, Gradient]:
    """The launcher `activation_bwd`, or what tuning chose in its place."""
    if choice == ASK:
        C = dy.shape[1]
        sizes = (dy.shape, (C, 1, 1), C, Geometry())
        choice = lookup(
            Problem("activation_bwd", dy.dtype, dy.get_device(), *sizes, channels_last, False, bias)
        )
    if choice == "library":
        dz = reference.activation_backward(dy, z, activation)
        dbias = dz.sum(_AXES) if bias else None
        if not dz.is_contiguous(memory_format=memory_format(channels_last)):
            dz = to_layout(dz.contiguous(), channels_last)
        return dz, dbias
    return kernel_module("activation_bwd").activation_bwd(
        dy, z, activation, bias=bias, channels_last=channels_last, config=choice
    )


def _real(dy: Tensor, z: Tensor, activation: str, bias: bool) -> tuple[Tensor, Tensor]:
    choice = ASK if can_run_kernels(dy) else "library"
    dz, dbias = run_bwd(dy, z, activation, bias, suggests_channels_last(dy, z), choice)
    return dz, dz.new_empty(0) if dbias is None else dbias


def _fake(dy: Tensor, z: Tensor, activation: str, bias: bool) -> tuple[Tensor, Tensor]:
    dz = empty(dy, dy.shape, suggests_channels_last(dy, z))
    return dz, dy.new_empty(dy.shape[1] if bias else 0)


def _composite(dy: Tensor, z: Tensor, activation: str, bias: bool) -> tuple[Tensor, Tensor]:
    dz = reference.activation_backward(dy, z, activation)
    return dz, dz.sum(_AXES) if bias else dz.new_empty(0)


def _vmap(op: Any) -> Any:
    def rule(
        info: Any, in_dims: tuple[Any, ...], dy: Tensor, z: Tensor, activation: str, bias: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        dy, z = (batch_as_channels(t, dim, info) for t, dim in zip((dy, z), in_dims[:2]))  # noqa: B905
        dz, dbias = op(dy, z, activation, bias)
        return (dz.unflatten(1, (info.batch_size, -1)), dbias.view(info.batch_size, -1)), (1, 0)

    return rule


define(
    "activation_backward(Tensor dy, Tensor z, str activation, bool bias) -> (Tensor, Tensor)",
    _real,
    _fake,
    autograd=composite_where_differentiated(_composite),
    vmap=_vmap,
)


def _real_sum(dy: Tensor) -> Tensor:
    if not can_run_kernels(dy):
        return dy.sum(_AXES)
    return kernel_module("activation_bwd").channel_sum(dy)


def _fake_sum(dy: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[1])


def _vmap_sum(op: Any) -> Any:
    def rule(info: Any, in_dims: tuple[Any, ...], dy: Tensor) -> tuple[Tensor, int]:
        return op(batch_as_channels(dy, in_dims[0], info)).view(info.batch_size, -1), 0

    return rule


define(
    "channel_sum(Tensor dy) -> Tensor",
    _real_sum,
    _fake_sum,
    autograd=composite_where_differentiated(lambda dy: dy.sum(_AXES)),
    vmap=_vmap_sum,
)
