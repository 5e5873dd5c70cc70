"""Depthwise separable factors of a dense weight, from the weight alone.

A dense weight is, for each input channel c, a matrix W_c [K, R*S]. Rank T depthwise separable
form replaces it by P_c D_c, T filters D_c [T, R*S] and their mixing weights P_c [K, T]. The best
such pair in the Frobenius norm is the truncated SVD of each W_c (Eckart and Young 1936; for
convolutions: Guo et al., "Network Decoupling", 2018). Only the singular vectors of one side are
needed, and they are the eigenvectors of a Gram matrix no larger than min(K, R*S).
"""

import torch
from torch import Tensor

from sepconv.factorize.factors import SeparableFactors
from sepconv.factorize.form import full_rank

# Channels are independent: so many float64 numbers are worked on at a time, 4 MB of them.
_NUMBERS = 2**19


def factorize_rank(weight: Tensor, rank: int) -> SeparableFactors:
    """Factors of a checked dense weight [K, C, R, S] at a rank; the algebra runs in float64.

    At `full_rank` and above the factors are exact by construction: the filters are the R*S
    canonical taps and the mixing weights are the weights themselves (or the other way round
    where K < R*S), so that not even rounding stands between the two forms.

    Example:
        >>> factorize_rank(torch.randn(16, 8, 3, 3), rank=9).error
        0.0
    """
    if rank >= full_rank(weight.shape):
        return _exact(weight)

    filters, mixing, energy = truncated(weight, rank)
    error = float(_errors_by_rank(energy)[rank].sqrt())
    return SeparableFactors(*to_weights(filters, mixing, weight), error)


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Filters [C, T, R*S], mixing weights [C, K, T] and energies [C, full_rank] of all channels."""
    parts = [_truncate(part, rank) for part in _parts(weight)]
    filters, mixing, energy = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return filters, mixing, energy


def _truncate(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    per_channel = _per_channel(weight)
    vectors, energies = _singular_vectors(per_channel)
    kept = vectors[:, :, :rank]
    if _is_tall(per_channel):
        filters, mixing = kept.mT, per_channel @ kept
    else:
        filters, mixing = kept.mT @ per_channel, kept
    return filters, mixing.to(weight.dtype), energies


def weight_errors(weight: Tensor) -> Tensor:
    """Relative squared errors of every rank, without building the factors.

    Returns:
        [full_rank + 1] in float64: entry T is ||W - W'||^2 / ||W||^2 at rank T; entry 0 is 1 and
        the last entry is 0. Decreasing and convex in T.
    """
    check_weight(weight)
    return _errors_by_rank(energies(weight))


def energies(weight: Tensor) -> Tensor:
    """Squared singular values [C, full_rank] of each channel of a weight [K, C, R, S], falling."""
    return torch.cat([_singular_vectors(_per_channel(part))[1] for part in _parts(weight)])


def _errors_by_rank(energies: Tensor) -> Tensor:
    """Energies [C, full_rank] to the share [full_rank + 1] that each rank loses, on the CPU."""
    by_rank = energies.sum(0).cpu()
    # From the smallest on, so that nothing cancels; the full rank is exact and loses 0.
    lost = torch.cat([by_rank, by_rank.new_zeros(1)]).flip(0).cumsum(0).flip(0)
    return lost / lost[0] if lost[0] > 0 else lost


def is_finite(weight: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, found without a temporary of its size.

    >>> is_finite(torch.ones(2)), is_finite(torch.tensor([1.0, float("nan")]))
    (True, False)
    """
    # Both extremes are NaN where any value is.
    return weight.numel() == 0 or bool(torch.stack(weight.detach().aminmax()).isfinite().all())


def check_weight(weight: Tensor) -> None:
    """Raise `ValueError` unless `weight` is a finite 4-D tensor."""
    if weight.dim() != 4:
        raise ValueError(f"weight: expected 4 dimensions [K, C, R, S], got {list(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"weight: expected a real floating dtype, got {weight.dtype}")
    if not is_finite(weight):
        raise ValueError("weight: expected finite values, got NaN or Inf")


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(max(1, _NUMBERS // max(1, weight[:, 0].numel())), dim=1)


def _per_channel(weight: Tensor) -> Tensor:
    """[K, C, R, S] to float64 [C, K, R*S]."""
    return weight.detach().flatten(2).transpose(0, 1).to(torch.float64)


def _is_tall(per_channel: Tensor) -> bool:
    return per_channel.shape[1] >= per_channel.shape[2]


def _singular_vectors(per_channel: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors as columns, and squared singular values [C, min(K, R*S)], falling.

    Of the two sides the one with the smaller Gram matrix: right vectors [C, R*S, R*S] where the
    matrices are tall, else left vectors [C, K, K]. Projecting on either gives the same factors;
    computing one side from the other would divide by singular values that may be zero.
    """
    gram = per_channel.mT @ per_channel if _is_tall(per_channel) else per_channel @ per_channel.mT
    energies, vectors = torch.linalg.eigh(gram)
    return vectors.flip(2), energies.flip(1).clamp_(min=0.0)


def _exact(weight: Tensor) -> SeparableFactors:
    # Cloned: factors that shared the weight's memory would be changed with it.
    per_channel = weight.detach().clone().flatten(2).transpose(0, 1)  # [C, K, R*S]
    channels, out_channels, taps = per_channel.shape
    if taps <= out_channels:
        identity = torch.eye(taps, dtype=weight.dtype, device=weight.device)
        filters, mixing = identity.expand(channels, -1, -1), per_channel
    else:
        identity = torch.eye(out_channels, dtype=weight.dtype, device=weight.device)
        filters, mixing = per_channel, identity.expand(channels, -1, -1)
    return SeparableFactors(*to_weights(filters, mixing, weight), 0.0)


def to_weights(filters: Tensor, mixing: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Filters [C, T, R*S] and mixing weights [C, K, T] in the layout and dtype of the ops.

    Args:
        filters: Of each channel.
        mixing: Likewise.
        like: [..., R, S], of the dtype that they shall have.
    """
    channels, rank, _ = filters.shape
    weight_dw = filters.reshape(channels * rank, 1, *like.shape[2:])
    weight_pw = mixing.transpose(0, 1).reshape(mixing.shape[1], channels * rank, 1, 1)
    return weight_dw.to(like.dtype).contiguous(), weight_pw.to(like.dtype).contiguous()
