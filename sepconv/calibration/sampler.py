"""Chosen pixels of a convolution's output, and what it reads for them."""

from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.factorize.moments import patches, pixels
from sepconv.graph import Match


class Rows(NamedTuple):
    """Samples of one convolution's pixels: what they read, their values, what is added to them."""

    x: Tensor | None  # [n, C*R*S]
    y: Tensor  # [n, K]
    addend: Tensor | None  # [n, K]


class Sampler:
    """Chooses pixels of one convolution's outputs, the same ones in every pass over a batch.

    Args:
        conv: The convolution.
        count: How many of each execution.
        seed: Of the choice.
    """

    def __init__(self, conv: Match, count: int, seed: int) -> None:
        self._conv, self._count = conv, count
        self._generator = torch.Generator().manual_seed(seed)
        self._positions = torch.empty(0, dtype=torch.long)

    def sample(self, x: Tensor | None, y: Tensor) -> Rows:
        """Choose pixels of y and gather them, and the patches of x, if given, that they read."""
        y = as_images(y, self._conv)
        total = y.shape[0] * y.shape[2] * y.shape[3]
        chosen = torch.randperm(total, generator=self._generator)[: self._count]
        self._positions = chosen.sort().values.to(y.device)
        out_size = (y.shape[2], y.shape[3])
        return Rows(None if x is None else self._read(x, out_size), self.values(y), None)

    def values(self, t: Tensor) -> Tensor:
        """Another tensor's values at the pixels chosen last."""
        return pixels(as_images(t, self._conv), self._positions)

    def read(self, x: Tensor, y: Tensor) -> Tensor:
        """What those pixels read of another input; y tells the size of the output."""
        y = as_images(y, self._conv)
        return self._read(x, (y.shape[2], y.shape[3]))

    def _read(self, x: Tensor, out_size: tuple[int, int]) -> Tensor:
        kernel = (self._conv.weight_2d.shape[2], self._conv.weight_2d.shape[3])
        geometry = self._conv.settings.of_images(kernel)
        return patches(as_images(x, self._conv), self._positions, out_size, kernel, geometry)


def as_images(t: Tensor, conv: Match) -> Tensor:
    """[N, C, H, W] of a batch or a single sample, of images or of sequences."""
    if t.dim() < conv.weight.dim():
        t = t.unsqueeze(0)
    return t if t.dim() == 4 else t.unsqueeze(2)
