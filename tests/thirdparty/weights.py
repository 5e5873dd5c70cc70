"""Random weights with which every convolution of a model shows in its outputs."""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

_CONVOLUTIONS = (_ConvNd, nn.Linear)


@torch.no_grad()
def strengthen(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all weights anew, in place, the same for the same seed.

    Freshly built models hide faults: convolutions that start at zero, scales of 1e-6 behind them,
    BatchNorms that are the identity. Here filters keep the size of what they are given (He et al.,
    2015), norms scale and shift it, and their statistics are not those of a new one.
    """
    drawn = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and parameter.numel():
                parameter.copy_(_value(module, name, parameter, drawn))
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2, generator=drawn)
            module.running_var.uniform_(0.7, 1.5, generator=drawn)
    return model


def _value(module: nn.Module, name: str, parameter: Tensor, drawn: torch.Generator) -> Tensor:
    def normal(scale: float) -> Tensor:
        return torch.empty(parameter.shape).normal_(0, scale, generator=drawn)

    if parameter.dim() >= 2 and "weight" in name:
        fan_in = parameter[0].numel() if isinstance(module, _CONVOLUTIONS) else parameter.shape[-1]
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            fan_in = parameter.numel() // parameter.shape[1]
        return normal(math.sqrt(2 / fan_in))
    if "bias" in name:
        return normal(0.1)
    if parameter.dim() <= 1 or all(size == 1 for size in parameter.shape[1:]):
        return torch.empty(parameter.shape).uniform_(0.6, 1.2, generator=drawn)  # scales
    spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
    return normal(max(spread, 0.1))  # embeddings, tokens
