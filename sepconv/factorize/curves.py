"""Errors of many forms of a layer at once, on rows that were not fitted, and the best of them."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.factorize.form import Form
from sepconv.factorize.moments import Moments
from sepconv.factorize.solve import whitened_filters
from sepconv.factorize.solve_form import Problem, input_map, mapped
from sepconv.factorize.symmetric import leading, precision, regular

_SHARES_IN = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # of the input channels
_SHARES_OUT = (1 / 2, 3 / 4)  # of the output channels
_LEAST = 2  # channels

LARGE = 2048  # numbers in a patch, from which on each look at a form takes seconds: fewer are taken


class HeldOut(NamedTuple):
    """Rows that no factor was fitted to, as second moments about the means of the fitted rows.

    Attributes:
        covariance: Of the inputs [D, D].
        cross: Of responses and inputs [K, D].
        energy: Of all responses: what a weight of zeros would miss.
    """

    covariance: Tensor
    cross: Tensor
    energy: float

    @staticmethod
    def of(weight: Tensor, held: Moments, fitted: Moments) -> "HeldOut":
        """Responses of a weight [K, D] to the inputs of both parts."""
        step = held.mean_x - fitted.mean_x
        covariance = held.covariance + torch.outer(step, step)
        cross = weight @ covariance
        return HeldOut(covariance, cross, float((cross * weight).sum()))

    def error(self, weight: Tensor) -> float:
        """Relative squared error of the response of another weight."""
        change = ((weight @ self.covariance - 2 * self.cross) * weight).sum()
        return (self.energy + float(change)) / max(self.energy, 1e-300)


def form_grid(weight_shape: tuple[int, ...]) -> list[Form]:
    """Forms [K, C, *taps] that are worth a look: every rank, and some channels before and after.

    >>> len(form_grid((128, 128, 3, 3))) > 100, form_grid((8, 4, 1, 1))
    (True, [Form(rank=1, rank_in=2, rank_out=None), Form(rank=1, rank_in=3, rank_out=None)])
    """
    out_channels, channels, *taps = weight_shape
    ranks_in = _sizes(channels, _SHARES_IN)
    if torch.Size(taps).numel() == 1:
        least = min(channels, out_channels)
        return [Form(1, rank_in) for rank_in in _sizes(least, _SHARES_IN) if rank_in < least]
    size = torch.Size(taps).numel()
    ranks_out = (None, *_sizes(out_channels, _SHARES_OUT))
    plain = [Form(rank, None, rank_out) for rank in _ranks(size, 4) for rank_out in ranks_out]
    mapped = [
        Form(rank, rank_in, rank_out)
        for rank in _ranks(size, 2 if channels * size >= LARGE else 4)
        for rank_in in ranks_in
        for rank_out in ranks_out
    ]
    forms = [form.within(weight_shape) for form in plain + mapped]
    return list(dict.fromkeys(forms))


def _ranks(taps: int, parts: int) -> list[int]:
    """In steps of 1, then of about a quarter, or as many parts."""
    ranks = [1]
    while ranks[-1] < taps:
        ranks.append(min(taps, ranks[-1] + max(1, ranks[-1] // parts)))
    return ranks


def _sizes(channels: int, shares: Iterable[float]) -> list[int]:
    """Numbers of channels near some shares, in multiples of 4 or 8 where they are many."""
    step = 8 if channels >= 128 else 4 if channels >= 32 else 1
    sizes = {max(step, round(share * channels / step) * step) for share in shares}
    return sorted(size for size in sizes if _LEAST <= size <= channels)


def outline(problem: Problem, held: HeldOut, taps: int, forms: Iterable[Form]) -> dict[Form, float]:
    """Relative held-out errors of forms in closed form, without a fit of each.

    The channel map and the filters of a form are the leading ones of nested bases, so that the
    moments in those bases serve all forms. What a search for the factors gains is not in it.

    Args:
        problem: The layer, and what it reads of the rows to fit.
        held: The other rows.
        taps: R*S.
        forms: Any.
    """
    forms = list(forms)
    errors: dict[Form, float] = {}
    through = [form for form in forms if form.rank_in is not None]
    plain = [form for form in forms if form.rank_in is None]
    # Predictions: beside the errors themselves what float32 rounds is nothing.
    dtype = precision(len(problem.metric))
    given = Problem(*(t.to(dtype) for t in problem))
    others = (held.covariance.to(dtype), held.cross.to(dtype))
    if through:
        widest = max(form.rank_in or 0 for form in through)
        weight_in = input_map(problem, taps)[:widest].to(dtype)
        read = mapped(*others, weight_in, taps)
        errors |= _nested_errors(given.reduced(weight_in, taps), read, held, taps, through)
    if plain:
        errors |= _nested_errors(given, others, held, taps, plain)
    return errors


class _Moments(NamedTuple):
    """Second moments in the basis of each channel's filters, the leading ones first."""

    gram: Tensor  # [C, R*S, C, R*S]
    cross: Tensor  # [K, C, R*S]


def _in_basis(filters: Tensor, covariance: Tensor, cross: Tensor) -> _Moments:
    """Covariance and cross-covariance of patches, in filters [C, R*S, R*S]."""
    channels, taps, _ = filters.shape
    half = filters @ covariance.view(channels, taps, -1)
    half = half.view(-1, channels, taps).transpose(0, 1) @ filters.mT
    gram = half.transpose(0, 1).reshape(channels, taps, channels, taps)
    cross = cross.unflatten(1, (channels, taps))
    return _Moments(gram, torch.einsum("kct,cut->kcu", cross, filters))


def _nested_errors(
    problem: Problem,
    others: tuple[Tensor, Tensor],
    held: HeldOut,
    taps: int,
    forms: Iterable[Form],
) -> dict[Form, float]:
    """Errors of forms whose filters and channels are the first ones of the same.

    Args:
        problem: Of the channels that the filters read.
        others: Covariance and cross-covariance of the same channels in the held-out rows.
        held: What errors are relative to.
        taps: R*S.
        forms: Any.
    """
    filters = whitened_filters(problem.weight.double(), problem.metric.double(), taps, taps).flip(1)
    filters = filters.to(problem.metric.dtype)
    fitted = _in_basis(filters, problem.metric, problem.cross)
    judged = _in_basis(filters, *others)
    groups: dict[tuple[int | None, int], list[Form]] = {}
    for form in forms:
        groups.setdefault((form.rank_in, form.rank), []).append(form)
    errors: dict[Form, float] = {}
    for (rank_in, rank), group in groups.items():
        here = (slice(rank_in), slice(rank))
        gram = fitted.gram[*here, *here].flatten(2).flatten(0, 1)
        cross = fitted.cross[:, *here].flatten(1)
        root = torch.linalg.cholesky(regular(gram))
        mixing = torch.cholesky_solve(cross.mT, root).mT
        energy = mixing @ judged.gram[*here, *here].flatten(2).flatten(0, 1)
        change = energy - 2 * judged.cross[:, *here].flatten(1)  # [K, rank_in*T], of the mixing
        if any(form.rank_out for form in group):
            directions = leading(cross @ mixing.mT, len(cross))
            pairs = (change.mT @ directions) * (mixing.mT @ directions)
            by_direction = pairs.sum(0).cumsum(0)
        else:
            by_direction = (change * mixing).sum(1).cumsum(0)
        for form in group:
            lost = by_direction[(form.rank_out or len(by_direction)) - 1]
            errors[form] = (held.energy + float(lost)) / max(held.energy, 1e-300)
    return errors


_Point = tuple[float, float, int]  # cost, error, which


def hull(costs: Mapping[Form, float], errors: Mapping[Form, float], dense: float) -> list[Form]:
    """The forms on the lower convex hull of error over cost, from the cheapest on.

    The dense form ends it: it costs `dense` and has no error.

    >>> costs = {Form(1): 1.0, Form(2): 2.0, Form(3): 3.0, Form(4): 4.0}
    >>> hull(costs, {Form(1): 0.9, Form(2): 0.85, Form(3): 0.2, Form(4): 0.3}, dense=9.0)
    [Form(rank=1, rank_in=None, rank_out=None), Form(rank=3, rank_in=None, rank_out=None)]
    """
    points = sorted((costs[form], errors[form], i) for i, form in enumerate(errors))
    forms = list(errors)
    corners: list[_Point] = []
    for point in [p for p in points if p[0] < dense] + [(dense, 0.0, -1)]:
        if corners and corners[-1][1] <= point[1] and point[2] >= 0:
            continue  # costs more, and is no better
        while len(corners) > 1 and _is_above(corners[-1], corners[-2], point):
            corners.pop()
        corners.append(point)
    return [forms[i] for _, _, i in corners if i >= 0]


def _is_above(
    middle: tuple[float, float, int],
    left: tuple[float, float, int],
    right: tuple[float, float, int],
) -> bool:
    """Whether a point is on or above the line between its neighbours."""
    slope = (right[1] - left[1]) / (right[0] - left[0])
    return middle[1] >= left[1] + slope * (middle[0] - left[0])
