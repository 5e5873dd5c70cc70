"""Layers whose patches are too long for the covariance of all their numbers.

Filters of 64 x 1 over 1,024 channels read patches of 65,536 numbers: their covariance would take
32 GiB. Such a layer gets the filters that suit each channel for itself (whitened SVD in the
covariance of its own taps), and only the outputs of these filters are looked at together: for given
filters the best mixing weights need no more than their moments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.factorize import Form
from sepconv.factorize.moments import Moments
from sepconv.factorize.solve import Factors
from sepconv.factorize.symmetric import roots
from sepconv.factorize.target import asymmetric_target, damped

LONGEST_PATCH = 5000  # numbers, of which the covariance takes 200 MB
_MOST_FEATURES, _MOST_RANK = 4096, 8


class Basis(NamedTuple):
    """Filters of a long layer, the leading ones first.

    Attributes:
        filters: [C, T, R*S]; their outputs are white for each channel.
        mixing: [K, C, T], the best for each channel alone.
    """

    filters: Tensor
    mixing: Tensor

    @staticmethod
    def of(weight: Tensor, blocks: Tensor) -> "Basis":
        """For a weight [K, C, R*S] and the covariances of each channel's taps [C, R*S, R*S]."""
        count = most_rank(weight.shape[1], blocks.shape[1])
        root, inverse = roots(torch.stack([damped(block) for block in blocks]))
        whitened = weight.transpose(0, 1) @ root  # [C, K, R*S]
        _, vectors = torch.linalg.eigh(whitened.mT @ whitened)
        leading = vectors[..., -count:].flip(-1)
        return Basis(leading.mT @ inverse, (whitened @ leading).transpose(0, 1))

    def fitted(self, moments: Moments, rank: int, ridge: float) -> Factors:
        """Factors of a rank for the moments of the filters' outputs and the wanted responses."""
        kept = self._leading(rank)
        covariance = moments.covariance[kept][:, kept]
        alone = self.mixing[:, :, :rank].flatten(1)
        mixing, _ = asymmetric_target(alone, covariance, moments.cross[:, kept], ridge)
        return Factors(self.filters[:, :rank], mixing.unflatten(1, (-1, rank)))

    def bias(self, moments: Moments, factors: Factors) -> Tensor:
        """What makes the mean of the responses right."""
        mean = moments.mean_x.view(self.filters.shape[:2])[:, : factors.filters.shape[1]]
        return moments.mean_y - (factors.mixing * mean).sum((1, 2))

    def error(self, factors: Factors, held: Moments) -> float:
        """Relative squared error of the response on other samples."""
        kept = self._leading(factors.filters.shape[1])
        mixing = factors.mixing.flatten(1)
        energy = float(held.variance_y.sum())
        explained = 2 * (mixing * held.cross[:, kept]).sum()
        explained = explained - ((mixing @ held.covariance[kept][:, kept]) * mixing).sum()
        return max(energy - float(explained), 0.0) / max(energy, 1e-300)

    def _leading(self, rank: int) -> Tensor:
        """Where the first filters of each channel stand among all."""
        channels, count, _ = self.filters.shape
        return torch.arange(channels * count).view(channels, count)[:, :rank].flatten()


def is_long(size: int) -> bool:
    """Whether patches of so many numbers are looked at filter by filter."""
    return size > LONGEST_PATCH


def most_rank(channels: int, taps: int) -> int:
    """The largest rank that a long layer is fitted at."""
    return max(1, min(_MOST_RANK, taps, _MOST_FEATURES // channels))


def can_fit(form: Form, channels: int, taps: int) -> bool:
    """Whether a long layer is fitted in a form; else its weight's own factors have to do."""
    return form.is_plain and form.rank <= most_rank(channels, taps)
