"""Symmetric matrices: roots, leading directions, and a solve that stays regular."""

import torch
from torch import Tensor

# Of each variance: little to a number of that kind, much to its rounding.
_REGULAR = {torch.float64: 1e-9, torch.float32: 1e-6}
NARROW_FROM = 500  # numbers in a patch: what is only compared or searched is then float32


def precision(size: int) -> torch.dtype:
    """To compare forms and search for factors in: in float32 it takes half the time."""
    return torch.float32 if size >= NARROW_FROM else torch.float64


def roots(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots [..., n, n] of positive definite matrices, and their inverses.

    >>> root, inverse = roots(torch.eye(2) * 4)
    >>> root.diagonal(), inverse.diagonal()
    (tensor([2., 2.]), tensor([0.5000, 0.5000]))
    """
    values, vectors = torch.linalg.eigh(covariances)
    lengths = values.clamp(min=1e-300).sqrt().unsqueeze(-2)
    return (vectors * lengths) @ vectors.mT, (vectors / lengths) @ vectors.mT


def leading(gram: Tensor, count: int) -> Tensor:
    """Eigenvectors [n, count] of the largest eigenvalues of a matrix [n, n], the largest first.

    >>> leading(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).abs().argmax(0)
    tensor([1, 2])
    """
    _, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    return vectors[:, -count:].flip(1)


def regular(covariance: Tensor) -> Tensor:
    """The same with a little more variance: rows that come near to each other do no harm."""
    return covariance + torch.diag_embed(
        _REGULAR[covariance.dtype] * covariance.diagonal().clamp(min=1e-30)
    )
