"""Factors of a dense weight in any form, from the weight alone."""

from torch import Tensor

from sepconv.factorize.factors import SeparableFactors
from sepconv.factorize.form import Form
from sepconv.factorize.svd import check_weight, factorize_rank
from sepconv.factorize.tucker import factorize_form


def factorize(weight: Tensor, rank: int | Form) -> SeparableFactors:
    """Factorise a dense weight [K, C, R, S]; the algebra runs in float64.

    At `full_rank` and above the factors are exact by construction: see `factorize_rank`.

    Args:
        weight: Finite.
        rank: Filters per channel, or all ranks of a form; above what the weight has, that.

    Raises:
        ValueError: `weight` is not a finite 4-D tensor, or `rank` is neither a positive int nor a
            `Form`.

    Example:
        >>> import torch
        >>> w = torch.randn(16, 8, 3, 3)
        >>> factors = factorize(w, rank=2)
        >>> factors.weight_dw.shape, factors.weight_pw.shape
        (torch.Size([16, 1, 3, 3]), torch.Size([16, 16, 1, 1]))
        >>> factorize(w, rank=9).error
        0.0
        >>> factorize(w, Form(2, rank_in=4)).weight_in.shape
        torch.Size([4, 8, 1, 1])
    """
    check_weight(weight)
    if isinstance(rank, Form):
        form = rank.within(tuple(weight.shape))
        if not form.is_plain:
            return factorize_form(weight, form)
        rank = form.rank
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank: expected an int of at least 1 or a sepconv.Form, got {rank!r}")
    return factorize_rank(weight, rank)
