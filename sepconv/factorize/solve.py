"""Separable factors of a dense weight in the metric of the data it sees.

With W [K, C*R*S] flattened and S the covariance of its input patches, the factors minimise

    J(P, D) = || (W - P D) S^(1/2) ||_F^2

where D holds T filters [R*S] per input channel and P their mixing weights. Weight-only SVD is the
special case S = I, and misses that channels are correlated: what one channel's filters cannot
express, other channels' mixing weights can.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.factorize.symmetric import roots

SWEEPS = 2  # later sweeps gain almost nothing (docs/accuracy.md)
_BALANCING = 10  # passes; each about halves what the logarithms of sizes differ by


class Factors(NamedTuple):
    """Filters D [C, T, R*S] and mixing weights P [K, C, T], maybe between two channel maps.

    Attributes:
        filters: [C, T, R*S], or [rank_in, T, R*S] with `weight_in`.
        mixing: [K, C, T], or [rank_out, C, T] with `weight_out`.
        weight_in: [rank_in, C], what the filters read of the input's channels.
        weight_out: [K, rank_out], the outputs from the mixed channels.
    """

    filters: Tensor
    mixing: Tensor
    weight_in: Tensor | None = None
    weight_out: Tensor | None = None

    def dense(self) -> Tensor:
        """The weight [K, C*R*S] that they stand for."""
        weight = torch.einsum("kct,ctr->kcr", self.mixing, self.filters)
        if self.weight_out is not None:
            weight = torch.einsum("ko,ocr->kcr", self.weight_out, weight)
        if self.weight_in is not None:
            weight = torch.einsum("kgr,gc->kcr", weight, self.weight_in)
        return weight.flatten(1)

    def named(self) -> dict[str, Tensor | None]:
        """By the names of a module's parameters; a 1x1 convolution's filters join the mixing."""
        mixing = self.mixing
        if self.filters.shape[2] == 1 and self.weight_in is not None:
            mixing = mixing * self.filters[..., 0]
        return {
            "weight_dw": self.filters,
            "weight_pw": mixing,
            "weight_in": self.weight_in,
            "weight_out": self.weight_out,
        }

    def mixed(self, matrix: Tensor) -> "Factors":
        """With outputs mixed by `matrix` [K, K]."""
        if self.weight_out is not None:
            return self._replace(weight_out=matrix @ self.weight_out)
        return self._replace(mixing=(matrix @ self.mixing.flatten(1)).view_as(self.mixing))

    def balanced(self) -> "Factors":
        """The same weight by factors of one size, as gradient steps and half precision want them.

        Closed forms leave the scale of the data in some of them, a million times the others' size.
        """
        filters, mixing, weight_in, weight_out = self
        if filters.shape[2] == 1 and weight_in is not None:  # only the products have a parameter
            mixing = mixing * filters[..., 0]
            scale = _between(weight_in, mixing.transpose(0, 1).flatten(1))
            mixing = mixing / scale[:, None]
            return Factors(torch.ones_like(filters), mixing, weight_in * scale[:, None], weight_out)
        for _ in range(_BALANCING):
            if weight_in is not None:
                scale = _between(weight_in, filters.flatten(1))[:, None]
                weight_in, filters = weight_in * scale, filters / scale[..., None]
            scale = _between(filters, mixing.movedim(0, -1))
            filters, mixing = filters * scale[..., None], mixing / scale
            if weight_out is not None:
                scale = _between(mixing.flatten(1), weight_out.mT)
                mixing, weight_out = mixing * scale[:, None, None], weight_out / scale
        return Factors(filters, mixing, weight_in, weight_out)


def _between(one: Tensor, other: Tensor) -> Tensor:
    """What to multiply vectors [..., n] by, and others [..., m] to divide by, for a common size."""
    sizes, others = (t.square().mean(-1) for t in (one, other))
    # What is zero stays, and what is multiplied with it can still learn.
    return torch.where((sizes > 0) & (others > 0), others / sizes, 1.0) ** 0.25


def solve(weight: Tensor, metric: Tensor, rank: int, taps: int, sweeps: int = SWEEPS) -> Factors:
    """Factors of `weight` at `rank`: whitened SVD, block updates, pointwise refit.

    Args:
        weight: W [K, C*R*S], float64.
        metric: S [C*R*S, C*R*S], symmetric positive definite, float64.
        rank: T, below min(K, R*S).
        taps: R*S.
        sweeps: Passes of block updates over the channels.

    Example:
        >>> w, s = torch.randn(8, 36).double(), torch.eye(36).double()
        >>> factors = solve(w, s, rank=2, taps=9)
        >>> factors.filters.shape, factors.mixing.shape
        (torch.Size([4, 2, 9]), torch.Size([8, 4, 2]))
    """
    factors = refit_mixing(weight, metric, whitened_filters(weight, metric, rank, taps))
    for _ in range(sweeps):
        factors = update_channels(weight, metric, factors)
    return refit_mixing(weight, metric, factors.filters) if sweeps else factors


def whitened_filters(weight: Tensor, metric: Tensor, rank: int, taps: int) -> Tensor:
    """Filters [C, T, R*S] that would be the best if channels were uncorrelated.

    The singular vectors of W_c S_cc^(1/2), from its R*S x R*S Gram matrix (the whitening of
    SVD-LLM, Wang et al. 2024, one channel at a time).
    """
    root, inverse = roots(channel_blocks(metric, taps))
    whitened = weight.unflatten(1, (-1, taps)).transpose(0, 1) @ root  # [C, K, R*S]
    _, vectors = torch.linalg.eigh(whitened.mT @ whitened)
    return vectors[..., -rank:].mT @ inverse


def refit_mixing(weight: Tensor, metric: Tensor, filters: Tensor) -> Factors:
    """The best mixing weights for given filters: P = W S D' (D S D')^-1."""
    channels, rank, taps = filters.shape
    blocks = metric.unflatten(1, (channels, taps))  # [C*R*S, C, R*S]
    read = torch.einsum("jdr,dur->jdu", blocks, filters).flatten(1)  # S D' [C*R*S, C*T]
    gram = torch.einsum("ctr,crg->ctg", filters, read.unflatten(0, (channels, taps)))
    gram = gram.flatten(0, 1)
    # Filters of dead channels are arbitrary and may repeat; this keeps the solve regular.
    gram.diagonal().add_(1e-10 * gram.diagonal().mean().clamp(min=1e-300))
    mixing = torch.cholesky_solve((weight @ read).mT, torch.linalg.cholesky(gram)).mT
    return Factors(filters, mixing.unflatten(1, (channels, rank)))


def update_channels(weight: Tensor, metric: Tensor, factors: Factors) -> Factors:
    """One sweep of block updates: each channel's factors, best given all the others'.

    With E the residual without channel c, the best rank T block is the truncated SVD of
    (E S)_c S_cc^(-1/2), so that J never rises.
    """
    filters, mixing = factors.filters.clone(), factors.mixing.clone()
    channels, rank, taps = filters.shape
    blocks = channel_blocks(metric, taps)
    _, inverses = roots(blocks)
    residual = (weight - factors.dense()) @ metric  # E S
    for c in range(channels):
        here = slice(c * taps, (c + 1) * taps)
        old = mixing[:, c] @ filters[c]
        whitened = (residual[:, here] + old @ blocks[c]) @ inverses[c]  # [K, R*S]
        _, vectors = torch.linalg.eigh(whitened.mT @ whitened)
        kept = vectors[:, -rank:]
        filters[c] = kept.mT @ inverses[c]
        mixing[:, c] = whitened @ kept
        residual -= (mixing[:, c] @ filters[c] - old) @ metric[here]
    return Factors(filters, mixing)


def channel_blocks(metric: Tensor, taps: int) -> Tensor:
    """The diagonal blocks S_cc [C, R*S, R*S]."""
    blocks = metric.unflatten(1, (-1, taps)).unflatten(0, (-1, taps))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
