"""Mean and variance of each channel, collected where a convolution makes its result.

A program of a convolution leaves for its tile of pixels the count, the mean and the sum of squared
deviations from that mean. Two such triples combine without cancellation (Chan, Golub and LeVeque,
1983, equation 2.1):

    n = n_a + n_b    mean = mean_a + (mean_b - mean_a) * n_b / n
    m2 = m2_a + m2_b + (mean_b - mean_a)**2 * n_a * n_b / n

The tiles are combined in a fixed order by a kernel that runs twice at most: the same bits every
time. A sum of squares would lose the variance of a channel whose mean is large.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sepconv.kernels.launch import accumulator, accumulator_dtype, ceil_div, launch

_BLOCK_T, _BLOCK_C, _NUM_WARPS = 32, 32, 4
# Up to this many triples one program combines; more are combined in as many shares first.
_MOST_TRIPLES = 64


class Triples(NamedTuple):
    """Triples of several tiles, of every channel.

    Attributes:
        moments: [TILES, 2, G], means and sums of squared deviations, in the accumulator's type.
        counts: [TILES], likewise.
    """

    moments: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def empty(cls, like: torch.Tensor, tiles: int, G: int) -> "Triples":
        """Uninitialised, in the type and on the device of a tensor."""
        return cls(like.new_empty((tiles, 2, G)), like.new_empty(tiles))


@triton.jit
def store_statistics(
    triples,
    tile,
    means,  # [BLOCK_NQ, BLOCK_C], of `rows` values of each lane
    squares,  # [BLOCK_NQ, BLOCK_C], their squared deviations from these means
    rows,
    mask_nq,
    offs_g,
    mask_g,
    G,
):
    """Leave the triple of one tile. Programs of several blocks of channels write one count."""
    inside = mask_nq[:, None]
    lanes = tl.sum(mask_nq.to(means.dtype), axis=0)
    mean = tl.sum(tl.where(inside, means, 0.0), axis=0) / tl.maximum(lanes, 1.0)
    deviation = tl.where(inside, means - mean[None, :], 0.0)
    m2 = tl.sum(tl.where(inside, squares, 0.0) + deviation * deviation * rows, axis=0)
    moments_ptrs = triples.moments + tile * 2 * G + offs_g
    tl.store(moments_ptrs, mean, mask=mask_g)
    tl.store(moments_ptrs + tl.cast(G, tl.int64), m2, mask=mask_g)
    tl.store(triples.counts + tile, lanes * rows)


@triton.jit
def _combine_kernel(
    triples,  # TILES of them
    combined,  # SPLITS of them
    sizes,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    TILES, G, num_g, trips = sizes
    pid = tl.program_id(0).to(tl.int64)
    pid_g = pid % num_g
    split = pid // num_g

    offs_g = pid_g * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_g = offs_g < G

    # Each lane of [BLOCK_T] has a triple of its own for [BLOCK_C] channels.
    counts = tl.zeros([BLOCK_T], ACC)
    means = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    squares = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    for i in range(trips):
        t = (split * trips + tl.cast(i, tl.int64)) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = t < TILES
        mask = mask_t[:, None] & mask_g[None, :]
        count = tl.load(triples.counts + t, mask=mask_t, other=0.0)
        ptrs = triples.moments + (t * 2 * G)[:, None] + offs_g[None, :]
        mean = tl.load(ptrs, mask=mask, other=0.0)
        m2 = tl.load(ptrs + tl.cast(G, tl.int64), mask=mask, other=0.0)

        total = counts + count
        share = (count / tl.maximum(total, 1.0))[:, None]
        delta = mean - means
        means += delta * share
        squares += m2 + delta * delta * counts[:, None] * share
        counts = total

    total = tl.sum(counts, axis=0)
    mean = tl.sum(means * counts[:, None], axis=0) / tl.maximum(total, 1.0)
    deviation = means - mean[None, :]
    m2 = tl.sum(squares + deviation * deviation * counts[:, None], axis=0)
    combined_ptrs = combined.moments + split * 2 * G + offs_g
    tl.store(combined_ptrs, mean, mask=mask_g)
    tl.store(combined_ptrs + tl.cast(G, tl.int64), m2, mask=mask_g)
    tl.store(combined.counts + split, total)


class Partial:
    """What the tiles of one convolution leave, and how it becomes a mean and a variance.

    Attributes:
        triples: Of each tile, uninitialised.
    """

    def __init__(self, y: torch.Tensor, tiles: int) -> None:
        like = torch.empty(0, dtype=accumulator_dtype(y.dtype), device=y.device)
        self.triples = Triples.empty(like, tiles, y.shape[1])
        self.per_channel = y.shape[0] * y.shape[2] * y.shape[3]

    def combine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance [G] of each channel."""
        triples = self.triples
        tiles = len(triples.counts)
        if not tiles:
            nothing = triples.moments.new_full(triples.moments.shape[2:], torch.nan)
            return nothing, nothing.clone()
        splits = ceil_div(tiles, _MOST_TRIPLES)
        if splits > 1:
            triples = _combined(triples, min(splits, _MOST_TRIPLES))
        (moments,), _ = _combined(triples, 1)
        return moments[0], moments[1] / self.per_channel


def collected_by(partial: Partial | None) -> Triples | None:
    """The argument of a kernel that may have to collect statistics."""
    return None if partial is None else partial.triples


def _combined(triples: Triples, splits: int) -> Triples:
    """The triples combined into that many."""
    tiles, _, G = triples.moments.shape
    num_g = ceil_div(G, _BLOCK_C)
    combined = Triples.empty(triples.counts, splits, G)
    launch(
        _combine_kernel,
        num_g * splits,
        (triples, combined),
        ((tiles, G, num_g, ceil_div(ceil_div(tiles, _BLOCK_T), splits)),),
        {"ACC": accumulator(triples.counts.dtype), "BLOCK_T": _BLOCK_T, "BLOCK_C": _BLOCK_C},
        num_warps=_NUM_WARPS,
        num_stages=1,
    )
    return combined
