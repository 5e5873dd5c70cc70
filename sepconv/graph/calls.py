"""Calls of convolutions: as torch's functions, and as the ATen operators in an exported program."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten

# Axes of the images; all of these take `ARGUMENTS`, in this order.
SPATIAL_DIMS: dict[Any, int] = {
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
    _aten.conv1d.default: 1,
    _aten.conv1d.padding: 1,
    _aten.conv2d.default: 2,
    _aten.conv2d.padding: 2,
    _aten.conv3d.default: 3,
    _aten.conv3d.padding: 3,
}
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# In a program that was decomposed, one operator for all axes and for transposed ones.
_GENERAL = _aten.convolution.default
_GENERAL_ARGUMENTS = (*ARGUMENTS[:6], "transposed", "output_padding", "groups")
_TRANSPOSED = _GENERAL_ARGUMENTS.index("transposed")


def is_convolution(func: Any, args: Sequence[Any]) -> bool:
    """Whether a call is a convolution, not transposed; its first arguments are `ARGUMENTS`."""
    return func in SPATIAL_DIMS or (func is _GENERAL and not args[_TRANSPOSED])


def spatial_dims(node: fx.Node) -> int:
    """Axes of the images that a node of a graph convolves; 0 if it calls no convolution."""
    if node.op != "call_function" or not is_convolution(node.target, node.args):
        return 0
    return SPATIAL_DIMS.get(node.target) or len(call_arguments(node)["stride"])


def call_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of a convolution by name, with torch's defaults."""
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    names = _GENERAL_ARGUMENTS if node.target is _GENERAL else ARGUMENTS
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def spread(value: Any, dims: int) -> Any:
    """An int, or a sequence of one or `dims` ints, as one entry per spatial axis."""
    if isinstance(value, str):
        return value
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * dims if len(values) == 1 else values
