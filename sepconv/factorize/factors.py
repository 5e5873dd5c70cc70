"""The factors that take the place of a dense weight, and the weight that they stand for."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.factorize.form import Form

FACTORS = ("weight_in", "weight_dw", "weight_pw", "weight_out")  # in the order in which they run


class SeparableFactors(NamedTuple):
    """Factors of a dense weight [K, C, R, S] at rank T.

    Attributes:
        weight_dw: [C*T, 1, R, S]; the T filters of a channel stand together. With `weight_in` the
            channels are its `rank_in`; of a 1x1 weight these are ones.
        weight_pw: [K, C*T, 1, 1]; with `weight_out` its `rank_out` stand in the place of K.
        error: ||W - W'||_F / ||W||_F of the factors before they are rounded to W's dtype.
        weight_in: [rank_in, C, 1, 1], None where the form has no `rank_in`.
        weight_out: [K, rank_out, 1, 1], None where the form has no `rank_out`.
    """

    weight_dw: Tensor
    weight_pw: Tensor
    error: float
    weight_in: Tensor | None = None
    weight_out: Tensor | None = None

    def named(self) -> dict[str, Tensor | None]:
        """The factors by their names."""
        return {name: getattr(self, name) for name in FACTORS}


def dense_weight(
    shape: Sequence[int],
    form: Form,
    weight_dw: Tensor | None,
    weight_pw: Tensor,
    weight_in: Tensor | None = None,
    weight_out: Tensor | None = None,
) -> Tensor:
    """The weight that factors stand for.

    Args:
        shape: Of the weight, [K, C, R, S] or [K, C, S].
        form: Of the factors.
        weight_dw: As in `SeparableFactors`, like the others; None stands for ones.
        weight_pw: [K, C*T, 1, 1].
        weight_in: Or None.
        weight_out: Or None.

    Example:
        >>> factors = torch.ones(8, 1, 3, 3), torch.ones(6, 8, 1, 1)
        >>> dense_weight((6, 4, 3, 3), Form(2), *factors).shape
        torch.Size([6, 4, 3, 3])
    """
    # The sizes are not asked of the tensors: to tracers these are not known.
    out_channels, channels = form.rank_out or shape[0], form.rank_in or shape[1]
    if weight_dw is None:
        dense = weight_pw.reshape(out_channels, channels, 1)
    else:
        pointwise = weight_pw.reshape(out_channels, channels, form.rank)
        depthwise = weight_dw.reshape(channels, form.rank, -1)
        dense = torch.einsum("kcm,cmt->kct", pointwise, depthwise)
    if weight_in is not None:
        dense = torch.einsum("kgt,gc->kct", dense, weight_in.reshape(channels, shape[1]))
    if weight_out is not None:
        dense = torch.einsum("kh,hct->kct", weight_out.reshape(shape[0], out_channels), dense)
    return dense.contiguous().view(*shape)
