"""Autocast, as torch's own convolution has it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sepconv.ops.library import LIBRARY


def is_autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    if not isinstance(x, Tensor):
        return False  # for the checks to refuse
    # `x.device.type` takes longer than the rest of the question.
    device_type = "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def cast(t: Tensor, device_type: str) -> Tensor:
    """Cast a tensor to autocast's dtype, float64 excepted."""
    if t.dtype == torch.float64 or not t.is_floating_point():
        return t
    return t.to(torch.get_autocast_dtype(device_type))


def cast_optional(t: Tensor | None, device_type: str) -> Tensor | None:
    """The same for an argument that may be left out."""
    return None if t is None else cast(t, device_type)


def _autocasting(op: Any, device_type: str) -> Callable[..., Tensor]:
    def kernel(*args: Any) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            return op(*(cast(a, device_type) if isinstance(a, Tensor) else a for a in args))

    return kernel


for _name in ("depthwise_conv2d", "pointwise_conv2d", "separable_conv2d"):
    for _key, _device_type in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        _op = getattr(torch.ops.sepconv, _name)
        LIBRARY.impl(_name, _autocasting(_op, _device_type), _key)
