"""What a conversion was asked for, as plain data for its report."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sepconv.conversion.options import Budget
from sepconv.factorize import Form


def settings(model: nn.Module, example_inputs: Any, **options: Any) -> dict[str, Any]:
    """The model's class, the shapes of its example inputs, and the options: JSON can hold them.

    Example:
        >>> import torch
        >>> settings(nn.Sequential(), torch.zeros(1, 3, 8, 8), budget=Budget(macs=0.5), seed=0)
        {'model': 'Sequential', 'example_inputs': ['1x3x8x8 float32'], 'budget': {'macs': 0.5}, \
'seed': 0}
    """
    inputs = [_shape(value) for value in tree_leaves(example_inputs) if isinstance(value, Tensor)]
    told = {"model": type(model).__name__, "example_inputs": inputs}
    return told | {name: _plain(value) for name, value in options.items()}


def _shape(tensor: Tensor) -> str:
    sizes = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{sizes} {str(tensor.dtype).removeprefix('torch.')}"


def _plain(value: Any) -> Any:
    if isinstance(value, Budget | Form):
        return {name: x for name, x in asdict(value).items() if x is not None}
    if isinstance(value, Mapping):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__name__)
