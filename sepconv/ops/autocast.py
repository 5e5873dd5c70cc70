"""Autocast, as torch's own convolution has it."""

import torch
from torch import Tensor


def is_autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    device_type = x.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def cast(t: Tensor, device_type: str) -> Tensor:
    """Cast a tensor to autocast's dtype, float64 excepted."""
    if t.dtype == torch.float64 or not t.is_floating_point():
        return t
    return t.to(torch.get_autocast_dtype(device_type))


def cast_optional(t: Tensor | None, device_type: str) -> Tensor | None:
    """The same for an argument that may be left out."""
    return None if t is None else cast(t, device_type)
