"""Operators that go back through an activation and the bias in front of it, in one pass.

Where gradients of the gradients are wanted, the operators are the ATen calls they stand for, which
autograd knows; else one kernel reads `dy` and `z` and writes `dz` and the sums.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sepconv.ops import reference, run
from sepconv.ops.backend import can_run_kernels
from sepconv.ops.kernel_modules import kernel_module
from sepconv.ops.layout import memory_format, suggests_channels_last
from sepconv.ops.library import LIBRARY, TAGS, fake, real

_AXES = (0, 2, 3)

LIBRARY.define(
    "activation_backward(Tensor dy, Tensor z, str activation, bool bias) -> (Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.define("channel_sum(Tensor dy) -> Tensor", tags=TAGS)


def before_activation(
    dy: Tensor, z: Tensor | None, activation: str | None, needs_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient in front of an activation, and of the bias there if it is needed.

    Args:
        dy: Gradient behind the activation, [N, C, H, W].
        z: The activation's input, for relu and relu6 its output; None without an activation.
        activation: By its name, or None.
        needs_bias: Whether the bias gradient [C] is needed.
    """
    if activation is None:
        return dy, torch.ops.sepconv.channel_sum(dy) if needs_bias else None
    dz, dbias = torch.ops.sepconv.activation_backward(dy, z, activation, needs_bias)
    return dz, dbias if needs_bias else None


def _reference(dy: Tensor, z: Tensor, activation: str, bias: bool) -> tuple[Tensor, Tensor]:
    dz = reference.activation_backward(dy, z, activation)
    dbias = dz.sum(_AXES) if bias else dz.new_empty(0)
    return dz, dbias


@real("activation_backward")
def _activation_backward(
    dy: Tensor, z: Tensor, activation: str, bias: bool
) -> tuple[Tensor, Tensor]:
    channels_last = suggests_channels_last(dy, z)
    choice = run.ASK if can_run_kernels(dy) else "library"
    dz, dbias = run.activation_bwd(dy, z, activation, bias, channels_last, choice)
    return dz, dz.new_empty(0) if dbias is None else dbias


@real("channel_sum")
def _channel_sum(dy: Tensor) -> Tensor:
    if not can_run_kernels(dy):
        return dy.sum(_AXES)
    return kernel_module("activation_bwd").channel_sum(dy)


@fake("activation_backward")
def _fake_activation_backward(
    dy: Tensor, z: Tensor, activation: str, bias: bool
) -> tuple[Tensor, Tensor]:
    layout = memory_format(suggests_channels_last(dy, z))
    dz = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device, memory_format=layout)
    return dz, dy.new_empty(dy.shape[1] if bias else 0)


@fake("channel_sum")
def _fake_channel_sum(dy: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[1])


def composite_where_differentiated(op: Any, composite: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of an operator of the backward pass for the dispatcher's Autograd key.

    Where a gradient of its result is wanted, `composite` computes that from torch's operators.
    """

    def kernel(keyset: Any, *args: Any) -> Any:
        wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if wanted or forward_ad._current_level >= 0:
            return composite(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


for _name, _composite in (
    ("activation_backward", _reference),
    ("channel_sum", lambda dy: dy.sum(_AXES)),
):
    _op = getattr(torch.ops.sepconv, _name).default
    LIBRARY.impl(
        _name, composite_where_differentiated(_op, _composite), "Autograd", with_keyset=True
    )


def _front(t: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """[B, N, C, H, W] as [N, B*C, H, W]: the images of each sample become its own channels."""
    t = t.expand(batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.transpose(0, 1).flatten(1, 2)


def _vmap_activation_backward(
    info: Any, in_dims: tuple[Any, ...], dy: Tensor, z: Tensor, activation: str, bias: bool
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    dy, z = (_front(t, dim, info.batch_size) for t, dim in ((dy, in_dims[0]), (z, in_dims[1])))
    dz, dbias = torch.ops.sepconv.activation_backward(dy, z, activation, bias)
    dbias = dbias.view(info.batch_size, -1)
    return (dz.unflatten(1, (info.batch_size, -1)), dbias), (1, 0)


def _vmap_channel_sum(info: Any, in_dims: tuple[Any, ...], dy: Tensor) -> tuple[Tensor, int]:
    sums = torch.ops.sepconv.channel_sum(_front(dy, in_dims[0], info.batch_size))
    return sums.view(info.batch_size, -1), 0


torch.library.register_vmap("sepconv::activation_backward", _vmap_activation_backward, lib=LIBRARY)
torch.library.register_vmap("sepconv::channel_sum", _vmap_channel_sum, lib=LIBRARY)
