"""Factors of a dense weight in a form with `rank_in` or `rank_out`, from the weight alone.

The channels are projected to the leading subspaces of the weight's own Gram matrices (the
higher-order SVD of De Lathauwer et al. 2000; for convolutions Kim et al. 2016), and what stands
between the projections is factorised channel by channel, as `sepconv.factorize.svd` does it.
"""

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from sepconv.factorize.factors import SeparableFactors, dense_weight
from sepconv.factorize.form import Form
from sepconv.factorize.svd import energies, factorize_rank
from sepconv.factorize.symmetric import leading

_PASSES = 3  # of a solve with a ridge, each for what the one before left


def factorize_form(weight: Tensor, form: Form) -> SeparableFactors:
    """Factors of a dense weight [K, C, R, S] in a form that is not plain; in float64.

    Args:
        weight: Finite.
        form: As `Form.within` gives it for this weight.

    Example:
        >>> factors = factorize_form(torch.randn(16, 8, 3, 3), Form(2, rank_in=4, rank_out=6))
        >>> [list(t.shape) for t in (factors.weight_in, factors.weight_pw, factors.weight_out)]
        [[4, 8, 1, 1], [6, 8, 1, 1], [16, 6, 1, 1]]
    """
    wide = weight.detach().double()
    if prod(weight.shape[2:]) == 1:
        return _low_rank(weight, form)
    weight_in, core = None, wide
    if form.rank_in is not None:
        taps = wide.flatten(2)
        weight_in = leading(torch.einsum("kct,kdt->cd", taps, taps), form.rank_in).T
        core = torch.einsum("kcrs,gc->kgrs", wide, weight_in).contiguous()
    weight_dw, weight_pw, *_ = factorize_rank(core, form.rank)
    weight_out = None
    if form.rank_out is not None:
        reached = dense_weight(core.shape, Form(form.rank), weight_dw, weight_pw).flatten(1)
        weight_out = leading(reached @ reached.T, form.rank_out)
        weight_pw = weight_out.T @ weight_pw.flatten(1)
    return _finished(weight, form, weight_dw, weight_pw, weight_in, weight_out)


def form_energies(weight: Tensor) -> Tensor:
    """How much of ||W||^2 each filter of each leading direction of the channels holds.

    Returns:
        [C, min(K, R*S)] in float64: the sum over the first `rank_in` rows and `rank` columns is
        what `factorize_form` keeps, without `rank_out`.
    """
    taps = weight.detach().double().flatten(2)
    rotation = leading(torch.einsum("kct,kdt->cd", taps, taps), taps.shape[1])
    rotated = torch.einsum("kct,cg->kgt", taps, rotation)
    return energies(rotated[..., None])


def remix(
    weight: Tensor, form: Form, weight_in: Tensor | None, weight_dw: Tensor
) -> SeparableFactors:
    """The best factors of `weight` behind given ones: least squares for what follows the filters.

    Where a weight had these and only its output channels were scaled, nothing is lost.

    Args:
        weight: [K, C, R, S], finite.
        form: Of the result, with filters larger than 1x1; `rank_out` is at most K there.
        weight_in: [rank_in, C, 1, 1], or None where the form has no `rank_in`.
        weight_dw: [rank_in*T, 1, R, S], without `rank_in` [C*T, 1, R, S].
    """
    wide = weight.detach().double()
    # Copied: results that shared memory with a module's parameters would be changed with them.
    filters = weight_dw.detach().to(torch.float64, copy=True)
    first = None if weight_in is None else weight_in.detach().to(torch.float64, copy=True)
    by_channel = filters.reshape(-1, form.rank, prod(weight.shape[2:]))
    # W = P B with rows B of one filter each, and their Gram matrix B B^T.
    mixed = torch.eye(len(by_channel)).to(wide) if first is None else _gram(first)
    gram = torch.einsum("gh,gmt,hnt->gmhn", mixed, by_channel, by_channel)
    gram = gram.flatten(2).flatten(0, 1)
    ridged = gram.clone()
    ridged.diagonal().add_(1e-10 * gram.diagonal().mean().clamp(min=1e-290))
    root = torch.linalg.cholesky(ridged)
    unsplit = Form(form.rank, form.rank_in)
    weight_pw = wide.new_zeros(len(wide), len(filters))
    for _ in range(_PASSES):
        left = wide - dense_weight(wide.shape, unsplit, filters, weight_pw, first)
        left = left.flatten(2)
        if first is not None:
            left = torch.einsum("kct,gc->kgt", left, first.flatten(1))
        read = torch.einsum("kgt,gmt->kgm", left, by_channel).flatten(1)
        weight_pw = weight_pw + torch.cholesky_solve(read.T, root).T
    if form.rank_out is None:
        return _finished(weight, form, filters, weight_pw, first, None)
    rank_out = min(form.rank_out, len(weight))
    weight_out = leading(weight_pw @ gram @ weight_pw.T, rank_out)
    made = replace(form, rank_out=rank_out)
    return _finished(weight, made, filters, weight_out.T @ weight_pw, first, weight_out)


def _low_rank(weight: Tensor, form: Form) -> SeparableFactors:
    """Two factors of a 1x1 weight [K, C, 1, 1]: its truncated SVD."""
    wide = weight.detach().double().flatten(1)
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    d = form.rank_in
    weight_in = right[:d]
    ones = torch.ones_like(weight_in[:, :1])
    return _finished(weight, form, ones, left[:, :d] * values[:d], weight_in, None)


def _gram(factor: Tensor) -> Tensor:
    return factor.flatten(1) @ factor.flatten(1).T


def _finished(
    weight: Tensor,
    form: Form,
    weight_dw: Tensor,
    weight_pw: Tensor,
    weight_in: Tensor | None,
    weight_out: Tensor | None,
) -> SeparableFactors:
    """Factors in the shapes and the dtype of the ops, and the error that they had in float64."""
    taps = weight.shape[2:]
    made = dense_weight(weight.shape, form, weight_dw, weight_pw, weight_in, weight_out)
    wide = weight.detach().double().flatten(1)
    error = (made.flatten(1) - wide).norm() / wide.norm().clamp(min=1e-300)

    def of_ops(factor: Tensor, *size: int) -> Tensor:
        return factor.reshape(len(factor), -1, *size).to(weight.dtype).contiguous()

    return SeparableFactors(
        of_ops(weight_dw, *taps),
        of_ops(weight_pw, 1, 1),
        float(error),
        None if weight_in is None else of_ops(weight_in, 1, 1),
        None if weight_out is None else of_ops(weight_out, 1, 1),
    )
