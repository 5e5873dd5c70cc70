"""Autocast, as torch's own convolution has it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    if not isinstance(x, Tensor):
        return False  # for the checks to refuse
    # `x.device.type` takes longer than the rest of the question.
    device_type = "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocasted(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors of a call in autocast's dtype where it is on for `x`."""
    if not is_autocasting(x):
        return (x, *others)
    device_type = x.device.type
    return tuple(None if t is None else _cast(t, device_type) for t in (x, *others))


def autocasting(op: Any, device_type: str) -> Callable[..., Tensor]:
    """The operator's kernel for the dispatcher's autocast key of a device."""

    def kernel(*args: Any) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            return op(*(_cast(a, device_type) if isinstance(a, Tensor) else a for a in args))

    return kernel


def _cast(t: Tensor, device_type: str) -> Tensor:
    """Autocast's dtype, float64 excepted."""
    if t.dtype == torch.float64 or not t.is_floating_point():
        return t
    return t.to(torch.get_autocast_dtype(device_type))
