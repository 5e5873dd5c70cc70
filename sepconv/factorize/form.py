"""Which factors take the place of a dense weight, as ranks; no tensors here."""

from dataclasses import dataclass
from math import prod

import torch


def full_rank(weight_shape: torch.Size | tuple[int, ...]) -> int:
    """The smallest rank at which any weight of this shape [K, C, R, S] is factorised exactly.

    >>> full_rank((64, 3, 3, 3)), full_rank((4, 3, 3, 3))
    (9, 4)
    """
    out_channels, _, *taps = weight_shape
    return min(out_channels, prod(taps))


@dataclass(frozen=True)
class Form:
    """The ranks of a separable form of a dense weight [K, C, R, S].

        C -> 1x1 to rank_in -> depthwise, `rank` filters each -> 1x1 to rank_out -> 1x1 to K

    Without `rank_in` the depthwise filters read the C channels themselves; without `rank_out` the
    1x1 convolution after them gives the K channels at once. `rank_in` and `rank_out` are the ranks
    of a Tucker decomposition of the two channel dimensions (Kim et al. 2016), whose core is here
    depthwise separable. A 1x1 convolution has no depthwise part: with `rank_in` it becomes two
    1x1 convolutions, C to `rank_in` to K.

    Args:
        rank: Depthwise filters per channel that they read.
        rank_in: Channels between the input and the depthwise filters, None for the input's own.
        rank_out: Channels between the two 1x1 convolutions after them, None for one convolution.

    Raises:
        ValueError: A rank is not an int of at least 1.

    Example:
        >>> form = Form(5, rank_in=32, rank_out=39)
        >>> str(form), form.params((128, 128, 3, 3)), Form(1).params((128, 128, 3, 3))
        ('32>5>39', 16768, 17536)
    """

    rank: int
    rank_in: int | None = None
    rank_out: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), *self._optional()):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Form: expected {name} an int of at least 1, got {value!r}")

    def _optional(self) -> list[tuple[str, int]]:
        given = (("rank_in", self.rank_in), ("rank_out", self.rank_out))
        return [(name, value) for name, value in given if value is not None]

    def __str__(self) -> str:
        if self.is_plain:
            return str(self.rank)
        return f"{self.rank_in or ''}>{self.rank}>{self.rank_out or ''}"

    @property
    def is_plain(self) -> bool:
        """Whether there is neither `rank_in` nor `rank_out`."""
        return self.rank_in is None and self.rank_out is None

    def within(self, weight_shape: tuple[int, ...]) -> "Form":
        """The same for a weight [K, C, *taps], without what could not change the result.

        >>> print(Form(20, 500, 500).within((64, 32, 3, 3)), Form(2, 16, 64).within((64, 32, 3, 3)))
        9 16>2>32
        """
        out_channels, channels, *taps = weight_shape
        rank_in = None if self.rank_in is None else min(self.rank_in, channels)
        if rank_in is not None and prod(taps) == 1:
            rank_in = min(rank_in, out_channels)
        rank = min(self.rank, full_rank(weight_shape), self.rank_out or self.rank)
        rank_out = None if self.rank_out is None else min(self.rank_out, out_channels)
        if rank_out is not None and prod(taps) > 1:
            # No more than the channels that it is computed from.
            rank_out = min(rank_out, (rank_in or channels) * rank)
        if rank_out == out_channels or prod(taps) == 1:
            rank_out = None
        if rank_in == channels and rank == full_rank(weight_shape):
            rank_in = None
        return Form(rank, rank_in, rank_out)

    def is_exact(self, weight_shape: tuple[int, ...]) -> bool:
        """Whether any weight of this shape has this form.

        >>> Form(9).is_exact((64, 32, 3, 3)), Form(9, rank_in=16).is_exact((64, 32, 3, 3))
        (True, False)
        """
        form = self.within(weight_shape)
        return form.is_plain and form.rank == full_rank(weight_shape)

    def sizes(self, weight_shape: tuple[int, ...]) -> tuple[int, int]:
        """Numbers in the 1x1 convolution before the depthwise filters, and in all that follows."""
        out_channels, channels, *taps = weight_shape
        middle = channels if self.rank_in is None else self.rank_in
        before = 0 if self.rank_in is None else channels * self.rank_in
        if prod(taps) == 1 and self.rank_in is not None:
            return before, middle * out_channels
        mixed = out_channels if self.rank_out is None else self.rank_out
        after = 0 if self.rank_out is None else self.rank_out * out_channels
        return before, middle * self.rank * (prod(taps) + mixed) + after

    def params(self, weight_shape: tuple[int, ...]) -> int:
        """Numbers in all factors."""
        return sum(self.sizes(weight_shape))
