"""Separable factors between two channel maps: a Tucker decomposition whose core is separable.

With W [K, C*R*S] flattened, S the covariance of its input patches and L a positive scale per output
channel, the factors minimise

    J(A, D, P, E) = || L (W - E P D (A x I)) S^(1/2) ||_F^2

A [rank_in, C] maps the input's channels at every tap, D holds T filters [R*S] for each mapped
channel, P mixes them to rank_out channels and E [K, rank_out] gives the K outputs. The inputs and
responses of a trained layer both lie near subspaces, so that A and E cost little error where the
filters that they save were dear. J is quadratic in each factor: they are fitted in turns, and J
never rises.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.factorize.form import Form
from sepconv.factorize.solve import Factors, refit_mixing, update_channels, whitened_filters

ROUNDS = 20  # of all factors in turns; half of them leave 10 to 30 % more error
_CG_STEPS = 4  # of conjugate gradients for A in each round
_ENOUGH = 2e-3  # relative gain of a round below which no other follows
_LONGEST = 8.0  # extrapolation of a step, in units of that


class Problem(NamedTuple):
    """A dense weight W [K, C*R*S] to come near to, and the metric S [C*R*S, C*R*S], float64."""

    weight: Tensor
    metric: Tensor

    def energy(self) -> float:
        """tr(W S W'), what the weight's response varies by."""
        return float(((self.weight @ self.metric) * self.weight).sum())

    def error(self, weight: Tensor) -> float:
        """J of another weight."""
        return Problem(self.weight - weight, self.metric).energy()

    def reduced(self, weight_in: Tensor, taps: int) -> "Problem":
        """The same for channels z = A x: the best weight that reads them, and their covariance."""
        rank_in, channels = weight_in.shape
        half = (weight_in @ self.metric.view(channels, -1)).view(rank_in * taps, channels, taps)
        metric = torch.einsum("xcs,gc->xgs", half, weight_in).flatten(1)
        cross = _mapped((self.weight @ self.metric).unflatten(1, (channels, taps)), weight_in)
        factor = torch.linalg.cholesky((metric + metric.mT) / 2)
        return Problem(torch.cholesky_solve(cross.mT, factor).mT, metric)


def solve_form(problem: Problem, form: Form, taps: int, scale: Tensor, rounds: int) -> Factors:
    """Factors of a weight in a form with `rank_in` or `rank_out`.

    Args:
        problem: The weight and the metric, which is positive definite.
        form: As `Form.within` gives it.
        taps: R*S.
        scale: The diagonal of L, [K] and positive.
        rounds: At most so many turns of all factors.

    Example:
        >>> problem = Problem(torch.randn(8, 36).double(), torch.eye(36).double())
        >>> factors = solve_form(problem, Form(2, 3, 5), 9, torch.ones(8).double(), rounds=2)
        >>> [tuple(f.shape) for f in factors]
        [(3, 2, 9), (5, 3, 2), (3, 4), (8, 5)]
    """
    scaled = Problem(problem.weight * scale[:, None], problem.metric)
    if form.rank_in is None:
        factors = _core(scaled, form, taps, None, sweeps=min(rounds, 2))
    elif taps == 1:
        factors = _two_pointwise(scaled, form.rank_in)
    else:
        factors = _in_turns(scaled, form, form.rank_in, taps, rounds)
    return factors.scaled(1 / scale)


def input_map(problem: Problem, taps: int) -> Tensor:
    """Directions [C, C] of the input's channels that occur and matter, the first ones the most.

    The rows are V' Cx^(-1/2), with V the eigenvectors of Cx^(1/2) M Cx^(1/2): Cx is the channels'
    covariance, averaged over the taps, and M = sum over taps of W_t' W_t. Mapped by them, channels
    are white. Principal components of Cx alone would not see what the weight reads.
    """
    channels = len(problem.metric) // taps
    by_tap = problem.weight.unflatten(1, (channels, taps))
    matter = torch.einsum("kct,kdt->cd", by_tap, by_tap)
    values, vectors = torch.linalg.eigh(_channel_covariance(problem.metric, taps))
    root = values.clamp(min=1e-12 * float(values[-1])).sqrt()
    half = vectors * root
    _, leading = torch.linalg.eigh(half.mT @ matter @ half)
    return leading.flip(1).mT @ (vectors / root).mT


def _two_pointwise(problem: Problem, rank: int) -> Factors:
    """A 1x1 convolution as two: the exact minimum, by reduced-rank regression."""
    channels = problem.weight.shape[1]
    alone = torch.ones(channels, 1, 1, dtype=torch.float64, device=problem.weight.device)
    weight_out = _leading(problem, Factors(alone, problem.weight[:, :, None]), rank)
    filters, mixing = alone[:rank], weight_out[:, :, None]
    return Factors(filters, mixing, weight_in=weight_out.mT @ problem.weight)


class _State(NamedTuple):
    weight_in: Tensor  # A [rank_in, C]
    core: Factors  # of the reduced problem
    error: float  # J


def _in_turns(problem: Problem, form: Form, rank_in: int, taps: int, rounds: int) -> Factors:
    """The core given A, then A given the core, and a longer step of A's where that is better."""
    cross = (problem.weight @ problem.metric).unflatten(1, (-1, taps))
    covariance = torch.linalg.cholesky(_channel_covariance(problem.metric, taps))
    energy = problem.energy()

    def fitted(weight_in: Tensor, start: Factors | None) -> _State:
        reduced = problem.reduced(weight_in, taps)
        core = _core(reduced, form, taps, start, sweeps=1)
        lost = energy - reduced.energy()  # by A alone
        return _State(weight_in, core, lost + reduced.error(core.dense()))

    state = fitted(input_map(problem, taps)[:rank_in], None)
    before, length = state.weight_in, 0.0
    for _ in range(rounds):
        step = _next_input_map(state, cross, problem.metric, covariance)
        longer, before = step + length * (step - before), step
        new = fitted(longer, state.core) if length > 0 else state
        if new.error < state.error:
            length = min(1.3 * length, _LONGEST)
        else:
            new = fitted(step, state.core)
            length = max(length / 2, 0.3) if length > 0 else 1.0
        gain = state.error - new.error
        if gain > 0:
            state = new
        if gain <= _ENOUGH * max(state.error, 1e-6 * energy):
            break
    return state.core._replace(weight_in=state.weight_in)


def _core(problem: Problem, form: Form, taps: int, start: Factors | None, sweeps: int) -> Factors:
    """Filters, mixing weights and `weight_out` for channels as they are, from `start` on."""
    weight, metric = problem
    ones = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
    if form.rank >= taps:  # any filters: the taps themselves, and nothing to improve
        eye = torch.eye(taps, dtype=torch.float64, device=weight.device)
        filters, sweeps = eye.expand(weight.shape[1] // taps, -1, -1), 0
    elif start is None:
        filters = whitened_filters(weight, metric, form.rank, taps, ones)
    else:
        filters = start.filters
    factors = refit_mixing(weight, metric, filters)
    for _ in range(sweeps):
        if form.rank_out is None:
            factors = update_channels(weight, metric, factors, ones)
        else:
            # Orthonormal columns: the error that remains is that of the rows they keep.
            kept = _leading(problem, factors, form.rank_out).mT
            rows = Factors(factors.filters, torch.einsum("ok,kct->oct", kept, factors.mixing))
            factors = update_channels(kept @ weight, metric, rows, ones[: len(kept)])
        factors = refit_mixing(weight, metric, factors.filters)
    if form.rank_out is None:
        return factors
    weight_out = _leading(problem, factors, form.rank_out)
    mixing = torch.einsum("ko,kct->oct", weight_out, factors.mixing)
    return Factors(factors.filters, mixing, weight_out=weight_out)


def _leading(problem: Problem, factors: Factors, rank: int) -> Tensor:
    """Orthonormal directions [K, rank] that hold the most of a response's variance.

    With the best mixing weights for their filters, no other `rank` directions leave less error
    (reduced-rank regression, Izenman 1975).
    """
    dense = factors.dense()
    _, vectors = torch.linalg.eigh(dense @ problem.metric @ dense.mT)
    return vectors[:, -rank:].flip(1)


def _next_input_map(state: _State, cross: Tensor, metric: Tensor, covariance: Tensor) -> Tensor:
    """A [rank_in, C] nearer to the best for the core: conjugate gradients on J.

    Args:
        state: A and the core.
        cross: W S [K, C, R*S].
        metric: S.
        covariance: Cholesky factor of the channels' covariance [C, C].
    """
    weight_in = state.weight_in
    rank_in, channels = weight_in.shape
    taps = cross.shape[2]
    core = state.core.dense().unflatten(1, (rank_in, taps))  # [K, rank_in, R*S]
    products = torch.einsum("kgs,khr->gshr", core, core)
    by_channel = metric.view(channels, -1)

    def curvature(a: Tensor) -> Tensor:
        read = (a @ by_channel).view(rank_in, taps, channels, taps)  # [h, r, c, s]
        return torch.einsum("gshr,hrcs->gc", products, read)

    mean = products.diagonal(dim1=1, dim2=3).sum(-1)
    mean.diagonal().add_(1e-8 * mean.diagonal().mean())
    factor = torch.linalg.cholesky(mean)

    def preconditioned(gradient: Tensor) -> Tensor:
        left = torch.cholesky_solve(gradient, factor)
        return torch.cholesky_solve(left.mT, covariance).mT

    residual = torch.einsum("kgr,kcr->gc", core, cross) - curvature(weight_in)
    direction = ready = preconditioned(residual)
    size = (residual * ready).sum()
    for _ in range(_CG_STEPS):
        bent = curvature(direction)
        along = (direction * bent).sum()
        if along <= 0:
            break
        weight_in = weight_in + size / along * direction
        residual = residual - size / along * bent
        ready = preconditioned(residual)
        size, old = (residual * ready).sum(), size
        direction = ready + size / old.clamp(min=1e-300) * direction
    return weight_in


def _channel_covariance(metric: Tensor, taps: int) -> Tensor:
    """[C, C], averaged over the taps."""
    channels = len(metric) // taps
    return metric.view(channels, taps, channels, taps).diagonal(dim1=1, dim2=3).mean(-1)


def _mapped(weight: Tensor, weight_in: Tensor) -> Tensor:
    """[K, C, R*S] to [K, rank_in*R*S]."""
    return torch.einsum("kct,gc->kgt", weight, weight_in).flatten(1)
