"""Optimizer, learning rate and averaged weights of the recipe."""

import copy
import math

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .recipe import Recipe


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split parameters: decay for dense and pointwise weights, none for all others.

    The paper (section 3.2) found little or no decay on depthwise filters important, since they
    have so few parameters; BatchNorm's and biases are left alone as in TF-slim.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for param in model.parameters():
        depthwise = param.dim() == 4 and param.shape[1] == 1 and param.shape[2] > 1
        (decayed if param.dim() > 1 and not depthwise else others).append(param)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """RMSprop as Inception V3 uses it: decay 0.9, momentum 0.9, epsilon 1 unless told."""
    groups = parameter_groups(model, recipe.weight_decay)
    return torch.optim.RMSprop(groups, lr=recipe.lr, alpha=0.9, eps=recipe.rms_eps, momentum=0.9)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step: linear warm-up, then cosine to zero or TF-slim's staircase."""
    warm = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    if recipe.schedule == "staircase":
        return recipe.lr * warm * 0.94 ** int(step / (2.5 * steps_per_epoch))
    progress = step / max(1, recipe.epochs * steps_per_epoch)
    return recipe.lr * warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class Average:
    """An exponential moving average of weights and statistics, quick to leave the start behind.

    Args:
        network: Where it starts.
        decay: How much of the average each step keeps, once `step` is well above `1 / (1 - decay)`.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._decay = decay

    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after a step."""
        mix = get_ema_multi_avg_fn(min(self._decay, (1 + step) / (10 + step)))
        averages, values = [], []
        for average, value in zip(
            self.network.state_dict().values(), network.state_dict().values(), strict=True
        ):
            if value.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        mix(averages, values, step)
