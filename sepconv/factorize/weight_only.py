"""Factors of a dense weight in any form, from the weight alone."""

from collections.abc import Iterable

from torch import Tensor

from sepconv.factorize.factors import SeparableFactors
from sepconv.factorize.form import Form
from sepconv.factorize.svd import check_weight, factorize_rank, weight_errors
from sepconv.factorize.tucker import factorize_form, form_energies


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


def weight_curve(weight: Tensor, forms: Iterable[Form | None]) -> dict[Form, float]:
    """Relative squared errors of a weight [K, C, R, S] in many forms, without factors of each.

    Forms with `rank_out` are left out: from the weight alone they gain nothing.

    >>> import torch
    >>> sorted(weight_curve(torch.randn(4, 4, 3, 3), [Form(1), Form(4), Form(2, 2)]).values())[0]
    0.0
    """
    wanted = [form for form in forms if form is not None and form.rank_out is None]
    by_rank = weight_errors(weight).tolist()
    curve = {form: by_rank[form.rank] for form in wanted if form.is_plain}
    if len(curve) < len(wanted):
        kept = form_energies(weight).cumsum(0).cumsum(1)
        whole = kept[-1, -1].clamp(min=1e-300)
        lost = (1 - kept / whole).clamp(min=0)
        curve |= {
            f: float(lost[f.rank_in - 1, f.rank - 1]) for f in wanted if f.rank_in is not None
        }
    return curve
