"""Refuse models that cannot be converted or fused, before anything is changed."""

import warnings
from typing import Any

import torch
from torch import nn

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")
_PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def checked_model(model: Any) -> nn.Module:
    """The module to work on: `model`, or what `torch.compile` wrapped.

    Raises:
        ValueError: Not a module; scripted, quantised, parallel-wrapped or without data.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    # Importing torch.compile's class to ask by `isinstance` would cost a second.
    if type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
        warnings.warn(
            "model: was compiled; the module inside is converted, compile the result again",
            stacklevel=4,
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
