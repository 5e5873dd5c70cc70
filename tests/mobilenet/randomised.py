"""Networks whose every parameter matters: fresh BatchNorms would hide mistakes."""

import torch
from torch import nn


def randomise_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics and weights of its own, and every bias a value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.0, 0.1, generator=generator)
            elif isinstance(getattr(module, "bias", None), nn.Parameter):
                module.bias.normal_(0.0, 0.1, generator=generator)
    return model


def images(n: int = 2, size: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of `b`."""
    assert a.shape == b.shape
    worst = ((a - b).abs().max() / b.abs().max()).item()
    assert worst == worst, "NaN"
    return worst
