"""What the tests' command lines name as MODULE:FUNCTION: `cli.nets:small`."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def small() -> nn.Module:
    """Two convolutions that can be converted, in train mode as a user's function may return it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def pointwise() -> nn.Module:
    """Nothing to convert."""
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten())


class Exporting(nn.Module):
    """Its graph is another function than its code."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y + 1 if torch.compiler.is_exporting() else y


def batches() -> Iterator[Tensor]:
    """A generator, which gives its batches once."""
    torch.manual_seed(1)
    for _ in range(4):
        yield torch.randn(8, 3, 12, 12)


def score(model: nn.Module) -> float:
    """Of a model, for `--evaluate`."""
    torch.manual_seed(2)
    x = torch.randn(16, 3, 12, 12)
    with torch.no_grad():
        return float((model(x).argmax(1) == small().eval()(x).argmax(1)).float().mean())


def a_number() -> int:
    return 1


def fails() -> nn.Module:
    raise RuntimeError("no such luck")


class Branching(nn.Module):
    """Which way it goes depends on the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.mean() > 100 else self.body(x) * 2
