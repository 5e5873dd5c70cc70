"""Which modules a model runs."""

from typing import Any

import torch
from torch import nn


def ran(model: nn.Module, *args: Any) -> list[type[nn.Module]]:
    """The classes of the modules that one forward calls, without those that call others."""
    calls: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda m, a, y: calls.append(m)) for m in model.modules()]
    with torch.no_grad():
        model(*args)
    for hook in hooks:
        hook.remove()
    inner = {child for m in calls for child in m.modules() if child is not m}
    outer = {
        m for m in calls if any(child in set(calls) for child in m.modules() if child is not m)
    }
    return [type(m) for m in calls if m in inner and m not in outer]
