"""Chosen pixels of a convolution's output, and what it reads for them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sepconv.factorize.moments import patches, pixels
from sepconv.graph import Match
from sepconv.kernels.geometry import Geometry


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
        filters: [C, T, R*S], whose outputs are taken in the place of patches.
    """

    def __init__(self, conv: Match, count: int, seed: int, filters: Tensor | None = None) -> None:
        self._conv, self._count, self._filters = conv, count, filters
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
        x = as_images(x, self._conv)
        if self._filters is None:
            return patches(x, self._positions, out_size, kernel, geometry)
        return self._filtered(x, geometry, kernel)

    def _filtered(self, x: Tensor, geometry: Geometry, kernel: tuple[int, int]) -> Tensor:
        """Outputs of the filters at the chosen pixels, image by image."""
        assert self._filters is not None
        stride, (top, bottom, left, right), dilation = geometry
        filters = self._filters.reshape(-1, 1, *kernel).to(x)
        rows, before = [], 0
        for image in F.pad(x, (left, right, top, bottom)).split(1):
            y = F.conv2d(image, filters, None, stride, 0, dilation, groups=x.shape[1])
            size = y.shape[2] * y.shape[3]
            here = self._positions[(self._positions >= before) & (self._positions < before + size)]
            rows.append(pixels(y, here - before))
            before += size
        return torch.cat(rows)


def as_images(t: Tensor, conv: Match) -> Tensor:
    """[N, C, H, W] of a batch or a single sample, of images or of sequences."""
    if t.dim() < conv.weight.dim():
        t = t.unsqueeze(0)
    return t if t.dim() == 4 else t.unsqueeze(2)
