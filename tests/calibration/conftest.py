"""Real digits, and small networks trained on them for a second or two."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

Digits = tuple[Tensor, Tensor]  # images [N, 1, 8, 8], labels [N]


@pytest.fixture(scope="session")
def digits() -> Digits:
    data = load_digits()
    x = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], torch.from_numpy(data.target)[order]


@pytest.fixture(scope="session")
def trained(digits: Digits) -> Callable[..., Any]:
    """Builds a network and trains it on the first 1,200 images; the same each time."""
    x, labels = digits

    def train(make: Callable[[], nn.Module], rate: float, epochs: int, batch: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make()
            optimizer = torch.optim.AdamW(model.parameters(), rate)
            for _ in range(epochs):
                for chosen in torch.randperm(1200).split(batch):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[chosen]), labels[chosen]).backward()
                    optimizer.step()
        return model.eval()

    return train
