"""Separable factors between two channel maps: a Tucker decomposition whose core is separable.

With W [K, C*R*S] flattened and S the covariance of its input patches, the factors minimise

    J(A, D, P, E) = || (W - E P D (A x I)) S^(1/2) ||_F^2

A [rank_in, C] maps the input's channels at every tap, D holds T filters [R*S] for each mapped
channel, P mixes them to rank_out channels and E [K, rank_out] gives the K outputs. The inputs and
responses of a trained layer both lie near subspaces, so that A and E cost little error where the
filters that they save were dear.

For given A and D the best P and E are known in closed form (least squares, reduced-rank
regression). So J is a function of A and D alone (variable projection, Golub and Pereyra 1973),
which L-BFGS lowers from where closed forms begin: ten to twenty times as fast as fitting all
factors in turns.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.factorize.form import Form
from sepconv.factorize.solve import Factors, whitened_filters
from sepconv.factorize.symmetric import leading, precision, regular, roots

STEPS = 100  # of L-BFGS at most
_CHECKED = 10  # steps between two looks at the gain
_ENOUGH = 2e-3  # of the error: a smaller gain over that many steps ends the search
_HISTORY = 10


class Problem(NamedTuple):
    """A dense weight to come near to, in the metric of the data; all float64.

    Attributes:
        weight: W [K, C*R*S].
        metric: S [C*R*S, C*R*S].
        cross: W S [K, C*R*S].
    """

    weight: Tensor
    metric: Tensor
    cross: Tensor

    @staticmethod
    def of(weight: Tensor, metric: Tensor) -> "Problem":
        """Of a weight and a metric."""
        return Problem(weight, metric, weight @ metric)

    def reduced(self, weight_in: Tensor, taps: int) -> "Problem":
        """The same for channels z = A x: the best weight that reads them, and their covariance."""
        metric, cross = mapped(self.metric, self.cross, weight_in, taps)
        mixed, channels = weight_in.shape
        if mixed == channels:  # all that there is can be read: the same responses
            by_channel = self.weight.unflatten(1, (channels, taps))
            inverse = torch.linalg.inv(weight_in)
            weight = torch.einsum("kct,cg->kgt", by_channel, inverse).flatten(1)
            return Problem(weight, metric, cross)
        factor = torch.linalg.cholesky(regular(metric))
        return Problem(torch.cholesky_solve(cross.mT, factor).mT, metric, cross)


def mapped(metric: Tensor, cross: Tensor, weight_in: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """Covariance and cross-covariance of channels z = A x from those of x."""
    channels = weight_in.shape[1]
    half = (weight_in @ metric.view(channels, -1)).view(-1, channels, taps)
    covariance = torch.einsum("xcs,gc->xgs", half, weight_in).flatten(1)
    read = torch.einsum("kct,gc->kgt", cross.unflatten(1, (channels, taps)), weight_in).flatten(1)
    return (covariance + covariance.mT) / 2, read


def solve_form(problem: Problem, form: Form, taps: int, steps: int) -> Factors:
    """Factors of a weight in a form with `rank_in` or `rank_out`.

    Args:
        problem: The weight and the metric, which is positive definite.
        form: As `Form.within` gives it.
        taps: R*S.
        steps: At most so many of L-BFGS; 0 for the closed forms.

    Example:
        >>> problem = Problem.of(torch.randn(8, 36).double(), torch.eye(36).double())
        >>> factors = solve_form(problem, Form(2, 3, 5), 9, steps=10)
        >>> [tuple(f.shape) for f in factors]
        [(3, 2, 9), (5, 3, 2), (3, 4), (8, 5)]
    """
    if taps == 1:
        assert form.rank_in is not None, "Form.within() leaves no other"
        return _two_pointwise(problem, form.rank_in)
    return _Search(problem, form, taps).run(steps)


def step_macs(form: Form, weight_shape: tuple[int, ...]) -> int:
    """About how many multiply-adds a step of the search takes, for a weight [K, C, R, S]."""
    out_channels, channels, *taps = weight_shape
    read = channels if form.rank_in is None else form.rank_in
    size = channels * prod(taps)
    return read * size * (size + form.rank * out_channels)


def input_map(problem: Problem, taps: int) -> Tensor:
    """Directions [C, C] of the input's channels that occur and matter, the first ones the most.

    The rows are V' Cx^(-1/2), with V the eigenvectors of Cx^(1/2) M Cx^(1/2): Cx is the channels'
    covariance, averaged over the taps, and M = sum over taps of W_t' W_t. Mapped by them, channels
    are white. Principal components of Cx alone would not see what the weight reads.
    """
    channels = len(problem.metric) // taps
    by_tap = problem.weight.unflatten(1, (channels, taps))
    matter = torch.einsum("kct,kdt->cd", by_tap, by_tap)
    blocks = problem.metric.view(channels, taps, channels, taps)
    root, inverse = roots(blocks.diagonal(dim1=1, dim2=3).mean(-1))
    return leading(root @ matter @ root, channels).mT @ inverse


def _two_pointwise(problem: Problem, rank: int) -> Factors:
    """A 1x1 convolution as two: the exact minimum, by reduced-rank regression."""
    weight = problem.weight
    # No other directions of the responses leave less error (Izenman 1975).
    white = weight @ torch.linalg.cholesky(regular(problem.metric))  # [K, C]
    if len(weight) > white.shape[1]:
        directions = torch.linalg.qr(white @ leading(white.mT @ white, rank)).Q
    else:
        directions = leading(white @ white.mT, rank)
    filters = weight.new_ones(rank, 1, 1)
    return Factors(filters, directions[:, :, None], weight_in=directions.mT @ weight)


class _Search:
    """J and its gradient, as functions of A and D.

    Coordinates are white, and scaled by how much each part is used, so that J bends alike along all
    of them: that makes the search some five times as short (docs/bottleneck.md).

    Args:
        problem: What to come near to.
        form: With `rank_in`, `rank_out` or both.
        taps: R*S.
    """

    def __init__(self, problem: Problem, form: Form, taps: int) -> None:
        self._form, self._taps = form, taps
        self._channels = len(problem.metric) // taps
        # No weight depends on the unit of the inputs, but float32 does not hold all of them.
        level = problem.metric.diagonal().mean()
        problem = problem._replace(metric=problem.metric / level, cross=problem.cross / level)
        # Channels last: to map them is then a product with A', and nothing is to be reordered.
        sizes = (self._channels, taps)
        self._metric = problem.metric.view(*sizes, *sizes).permute(0, 1, 3, 2).contiguous()
        self._cross = problem.cross.unflatten(1, sizes).mT.contiguous()  # [K, R*S, C]
        self._energy = max(float((problem.cross * problem.weight).sum()), 1e-300)
        self._weight_in = self._first_map(problem)
        if self._weight_in is not None:
            problem = problem.reduced(self._weight_in, taps)
        self._whole = form.rank >= taps  # any filter: the taps themselves, nothing to search
        if self._whole:
            eye = torch.eye(taps, dtype=torch.float64, device=problem.metric.device)
            self._filters = eye.expand(len(problem.metric) // taps, -1, -1)
        else:
            self._filters = whitened_filters(problem.weight, problem.metric, form.rank, taps)

    def _first_map(self, problem: Problem) -> Tensor | None:
        rank_in = self._form.rank_in
        if rank_in is None:
            return None
        if rank_in == self._channels:  # as they are: the filters of plain ranks fit them
            return torch.eye(rank_in, dtype=torch.float64, device=problem.metric.device)
        return input_map(problem, self._taps)[:rank_in]

    def run(self, steps: int) -> Factors:
        """Search, and the factors at the end of it."""
        if steps > 0 and not (self._whole and self._weight_in is None):
            self._set_coordinates()
            moments = self._metric, self._cross
            self._cast(precision(self._channels * self._taps))
            self._search(steps)
            self._cast(torch.float64)
            self._metric, self._cross = moments
        _, mixing, _ = self._best_mixing()
        if self._form.rank_out is None:
            return Factors(self._filters, mixing, self._weight_in)
        left, _, _ = torch.linalg.svd(mixing.flatten(1), full_matrices=False)
        weight_out = left[:, : self._form.rank_out]
        mixing = torch.einsum("ko,kct->oct", weight_out, mixing)
        return Factors(self._filters, mixing, self._weight_in, weight_out)

    def _set_coordinates(self) -> None:
        """Rows of norm 1 in white coordinates; how much of them is used is their length."""
        of_channels = self._metric.diagonal(dim1=1, dim2=2).mean(-1)  # [C, C]
        of_taps = self._metric.diagonal(dim1=0, dim2=3).mean(-1)  # [R*S, R*S]
        to_white_in, self._from_white_in = roots(of_channels)
        to_white, self._from_white = roots(of_taps)
        filters = _unit(self._filters @ to_white)
        self._filters = filters @ self._from_white if not self._whole else self._filters
        weight_in = None
        if self._weight_in is not None:
            weight_in = _unit(self._weight_in @ to_white_in)
            self._weight_in = weight_in @ self._from_white_in
        _, mixing, _ = self._best_mixing()
        used = mixing.square().sum(0)  # [rank_in, T]
        self._used, self._used_in = _lengths(used), _lengths(used.sum(1))
        self._free: list[Tensor] = []
        if weight_in is not None:
            self._free.append(weight_in * self._used_in[:, None])
        if not self._whole:
            self._free.append(filters * self._used[..., None])

    def _cast(self, dtype: torch.dtype) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(dtype))
        self._free = [value.to(dtype) for value in self._free]

    def _search(self, steps: int) -> None:
        optimizer = torch.optim.LBFGS(
            self._free,
            max_iter=min(steps, _CHECKED),
            tolerance_grad=0.0,
            tolerance_change=0.0,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )
        before = float("inf")
        for _ in range(-(-steps // _CHECKED)):
            error = float(optimizer.step(self._evaluate))
            if before - error <= _ENOUGH * max(error, 1e-9):
                break
            before = error
        self._take_free()

    def _take_free(self) -> None:
        rest = list(self._free)
        if self._weight_in is not None:
            self._weight_in = rest.pop(0) / self._used_in[:, None] @ self._from_white_in
        if rest:
            self._filters = rest.pop(0) / self._used[..., None] @ self._from_white

    @torch.no_grad()
    def _evaluate(self) -> Tensor:
        """J over the energy of the response; leaves its gradient."""
        self._take_free()
        read, mixing, error = self._best_mixing()
        made = mixing.flatten(1) @ read.flatten(0, 1).flatten(1)  # W' S
        surplus = made.view_as(self._cross) - self._cross
        by_channel = mixing.transpose(0, 1)  # [g, K, T]
        gradients = []
        if self._weight_in is not None:
            core = by_channel @ self._filters  # [g, K, R*S]
            of_map = core.flatten(1) @ surplus.flatten(0, 1) @ self._from_white_in
            gradients.append(of_map / self._used_in[:, None])
        if not self._whole:
            of_filters = by_channel.mT @ self._through(surplus)
            gradients.append(of_filters @ self._from_white / self._used[..., None])
        for parameter, gradient in zip(self._free, gradients, strict=True):
            parameter.grad = 2 / self._energy * gradient
        return error / self._energy

    def _best_mixing(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the filters read of the metric [g, T, R*S, C]; the best P for it [K, g, T]; J."""
        rows = self._metric.flatten(1)
        if self._weight_in is not None:
            rows = self._weight_in @ rows
        read = self._filters @ rows.view(len(rows), self._taps, -1)
        read = read.unflatten(2, (self._taps, self._channels))
        gram = self._filtered(read.flatten(0, 1))
        cross = self._filtered(self._cross)
        root = torch.linalg.cholesky(regular((gram + gram.mT) / 2))
        mixing = torch.cholesky_solve(cross.mT, root).mT
        if self._form.rank_out is not None:
            kept = leading(cross @ mixing.mT, self._form.rank_out)
            mixing = kept @ (kept.mT @ mixing)
        error = self._energy - 2 * (mixing * cross).sum() + ((mixing @ gram) * mixing).sum()
        return read, mixing.unflatten(1, read.shape[:2]), error

    def _through(self, t: Tensor) -> Tensor:
        """[n, R*S, C] through A: [rank_in, n, R*S]."""
        mapped = t if self._weight_in is None else t @ self._weight_in.mT
        return mapped.permute(2, 0, 1)

    def _filtered(self, t: Tensor) -> Tensor:
        """[n, R*S, C] through A and D: [n, rank_in*T]."""
        return (self._through(t) @ self._filters.mT).transpose(0, 1).flatten(1)


def _lengths(squares: Tensor) -> Tensor:
    """Their roots, of mean 1 and not too small."""
    lengths = squares.sqrt()
    return (lengths / lengths.mean().clamp(min=1e-150)).clamp(min=1e-3)


def _unit(t: Tensor) -> Tensor:
    """With rows of norm 1."""
    return (t / t.norm(dim=-1, keepdim=True).clamp(min=1e-150)).contiguous()
