"""Refuse what cannot be converted, before anything is changed."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sepconv.conversion.budget import Budget
from sepconv.factorize import is_finite
from sepconv.graph import Match

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")
_PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def checked_model(model: Any) -> nn.Module:
    """The module to convert: `model`, or what `torch.compile` wrapped.

    Raises:
        ValueError: not a module; scripted, quantised, parallel-wrapped or without data.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    # Importing torch.compile's class to ask by `isinstance` would cost a second.
    if type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
        warnings.warn(
            "model: was compiled; the module inside is converted, compile the result again",
            stacklevel=3,
        )
        model = model._orig_mod
    for name, module in model.named_modules():
        _check_module(name or "the model itself", module)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"model: expected parameters with data, got {name} on the meta device; "
                "load its weights first"
            )
    return model


def _check_module(name: str, module: nn.Module) -> None:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"model: expected Python modules, got a scripted one ({name})")
    if kind.__module__.startswith(_QUANTIZED):
        raise ValueError(
            f"model: expected floating point modules, got quantised {kind.__name__} ({name}); "
            "convert before quantising"
        )
    if kind.__name__ in _PARALLEL and kind.__module__.startswith("torch."):
        raise ValueError(
            f"model: expected a module that is not yet wrapped, got {kind.__name__} ({name}); "
            "convert model.module and wrap the result"
        )
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
        raise ValueError(f"model: expected a module that is not yet sharded, got {name} sharded")


def check_finite(matches: Iterable[Match]) -> None:
    """Raise `ValueError` for a convolution whose weight has a NaN or an infinity."""
    for conv in matches:
        if not is_finite(conv.weight):
            raise ValueError(f"model: expected finite weights, got NaN or Inf in {conv.name}")


def check_options(
    rank: object, budget: object, example_inputs: object, only_if_faster: bool, filter_fn: object
) -> None:
    """Raise `ValueError` for options that contradict each other or lack what they need."""
    if filter_fn is not None and not callable(filter_fn):
        raise ValueError(
            f"filter_fn: expected a function (module, name) -> bool, got {filter_fn!r}"
        )
    if budget is not None and not isinstance(budget, Budget):
        raise ValueError(f"budget: expected a sepconv.Budget, got {budget!r}")
    if rank is not None and budget is not None:
        raise ValueError("rank, budget: expected one of them, got both")
    if example_inputs is None:
        if budget is not None and budget.kind != "params":
            raise ValueError(f"example_inputs: needed to know the model's {budget.kind}, got None")
        if only_if_faster:
            raise ValueError("example_inputs: needed to measure latency, got None")
