"""What tests of calibration share: a model's responses, and whether moments agree."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.calibration.batches import read_batches
from sepconv.calibration.fit import Calibration
from sepconv.calibration.observe import Dense
from sepconv.calibration.responses import Responses
from sepconv.factorize.moments import Moments
from sepconv.graph import Match, capture, match

CPU = torch.device("cpu")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matches_of(
    model: nn.Module, example: Any, first: bool = True, pointwise: bool = False
) -> list[Match]:
    found = match(model, capture(model, example), pointwise=pointwise)
    return [conv for conv in found if isinstance(conv, Match) and (first or not conv.first)]


def responses_of(
    model: nn.Module,
    fitted: Sequence[Any],
    held: Sequence[Any] | None = None,
    seed: int = 0,
    example: Any = None,
) -> Responses:
    """Without `held`, the samples that are fitted to are those that judge, too."""
    if example is None:
        example = fitted[0][:1]
    matches = matches_of(model, example)
    read = [read_batches(some, example, CPU) for some in (fitted, held or fitted)]
    return Responses(model, matches, *read, seed)


def study_of(model: nn.Module, batches: Sequence[Tensor], **options: Any) -> Calibration:
    example = batches[0][:1]
    matches = matches_of(model, example, first=False)
    return Calibration(model, matches, batches, example, **options)


def changed(conv: Match, size: float = 0.3, seed: int = 0) -> Dense:
    """Parameters of a convolution that are clearly others."""
    weight = conv.weight.detach()
    weight = weight + size * weight.std() * random(seed, *weight.shape)
    bias = torch.zeros(len(weight)) if conv.bias is None else conv.bias.detach()
    return Dense(weight, bias + 0.1 * size * random(seed + 1, len(weight)))


def assert_same_moments(ours: Moments, theirs: Moments, rtol: float = 1e-4) -> None:
    """Up to the rounding of float32 in what the layers before have computed."""
    assert ours.count == theirs.count
    for name in ("mean_x", "mean_y", "covariance", "cross", "variance_y"):
        a, b = getattr(ours, name), getattr(theirs, name)
        atol = rtol * float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def normalised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with statistics of BatchNorm that are not those of a new one."""
    for i, module in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        count = module.num_features
        module.running_mean.copy_(0.3 * random(seed + i, count))
        module.running_var.copy_(0.5 + random(seed + i + 100, count).square())
        with torch.no_grad():
            module.weight.copy_(1 + 0.3 * random(seed + i + 200, count))
            module.bias.copy_(0.3 * random(seed + i + 300, count))
    return model.eval()


class Watched(nn.Module):
    """One layer whose result nobody reads, and one before something without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unread = nn.Conv2d(8, 8, 3)
        self.read = nn.Conv2d(8, 8, 3)
        self.cut = nn.Conv2d(8, 8, 3)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(float(self.unread(x).mean().detach()))
        return self.read(x).relu() + self.cut(x).detach()
