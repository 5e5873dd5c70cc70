"""The algebra of calibration against brute force."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sepconv.factorize.moments import Moments, patches, pixels
from sepconv.factorize.solve import (
    Factors,
    refit_mixing,
    solve,
    update_channels,
    whitened_filters,
)
from sepconv.factorize.target import asymmetric_target, damped
from sepconv.kernels.geometry import Geometry, padding_sides

K, C, TAPS, ROWS = 7, 4, 6, 300


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def objective(weight: Tensor, metric: Tensor, factors: Factors) -> float:
    """J(P, D) of `sepconv.factorize.solve`."""
    left = weight - factors.dense()
    return float(((left @ metric) * left).sum())


def correlated_rows(generator: torch.Generator) -> Tensor:
    mixing = random(generator, C * TAPS, C * TAPS)
    rows = random(generator, ROWS, C * TAPS) @ mixing
    return rows - rows.mean(0)


@pytest.fixture
def problem(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A weight and the covariance of its inputs."""
    rows = correlated_rows(generator)
    return random(generator, K, C * TAPS), damped(rows.T @ rows / ROWS)


def test_mixing_is_the_least_squares_solution(generator: torch.Generator) -> None:
    rows, weight = correlated_rows(generator), random(generator, K, C * TAPS)
    filters = random(generator, C, 2, TAPS)
    factors = refit_mixing(weight, rows.T @ rows / ROWS, filters)
    depthwise = torch.einsum("ncr,ctr->nct", rows.unflatten(1, (C, TAPS)), filters).flatten(1)
    expected = torch.linalg.lstsq(depthwise, rows @ weight.T).solution.T
    torch.testing.assert_close(factors.mixing.flatten(1), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_block_updates_never_raise_the_objective(problem: tuple[Tensor, Tensor], rank: int) -> None:
    weight, metric = problem
    filters = whitened_filters(weight, metric, rank, TAPS)
    factors = refit_mixing(weight, metric, filters)
    values = [objective(weight, metric, factors)]
    for _ in range(4):
        factors = update_channels(weight, metric, factors)
        values.append(objective(weight, metric, factors))
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(values)), values
    assert values[-1] < 0.999 * values[0]


def test_one_block_is_the_best_rank_t_approximation(
    problem: tuple[Tensor, Tensor], generator: torch.Generator
) -> None:
    """With one channel a single update is the global optimum: no other factors do better."""
    weight, metric = (problem[0][:, :TAPS], problem[1][:TAPS, :TAPS])
    start = Factors(random(generator, 1, 2, TAPS), random(generator, K, 1, 2))
    found = objective(weight, metric, update_channels(weight, metric, start))
    root = torch.linalg.cholesky(metric)
    singular = torch.linalg.svdvals(weight @ root)
    assert found == pytest.approx(float(singular[2:].square().sum()), rel=1e-6)


def test_solve_is_weight_svd_for_white_inputs(generator: torch.Generator) -> None:
    weight, identity = random(generator, K, C * TAPS), torch.eye(C * TAPS, dtype=torch.float64)
    found = objective(weight, identity, solve(weight, identity, 2, TAPS))
    channels = weight.unflatten(1, (C, TAPS)).transpose(0, 1)
    expected = torch.linalg.svdvals(channels)[:, 2:].square().sum()
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_full_rank_of_the_solver_is_exact(problem: tuple[Tensor, Tensor]) -> None:
    weight, metric = problem
    factors = solve(weight, metric, TAPS, TAPS)
    torch.testing.assert_close(factors.dense(), weight, rtol=1e-6, atol=1e-6)


def test_dead_inputs_keep_the_weight(generator: torch.Generator) -> None:
    weight = random(generator, K, C * TAPS)
    zero = torch.zeros(C * TAPS, C * TAPS, dtype=torch.float64)
    target, metric = asymmetric_target(weight, zero, zero[:K])
    assert bool(torch.isfinite(solve(weight, metric, 1, TAPS).dense()).all())
    torch.testing.assert_close(target, weight)


def test_one_dead_channel_is_survived(generator: torch.Generator) -> None:
    rows = correlated_rows(generator)
    rows[:, :TAPS] = 0
    metric = damped(rows.T @ rows / ROWS)
    weight = random(generator, K, C * TAPS)
    assert bool(torch.isfinite(solve(weight, metric, 2, TAPS).dense()).all())


def test_asymmetric_target_is_ridge_regression_by_brute_force(generator: torch.Generator) -> None:
    before, weight = correlated_rows(generator), random(generator, K, C * TAPS)
    after = before + 0.3 * random(generator, ROWS, C * TAPS)
    after = after - after.mean(0)
    response = before @ weight.T
    covariance, cross = after.T @ after / ROWS, response.T @ after / ROWS
    target, metric = asymmetric_target(weight, covariance, cross, ridge=0.05)

    level = 0.05 * covariance.diagonal().mean()
    pull = (level * ROWS).sqrt() * torch.eye(C * TAPS, dtype=torch.float64)
    rows, values = torch.cat([after, pull]), torch.cat([response, pull @ weight.T])
    expected = torch.linalg.lstsq(rows, values).solution.T
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(metric, covariance + level * torch.eye(C * TAPS).double())


def test_moments_of_batches_are_those_of_all_rows(generator: torch.Generator) -> None:
    x, y = 100 + random(generator, 50, 3), random(generator, 50, 2) - 7
    moments = Moments()
    for rows in (slice(0, 1), slice(1, 20), slice(20, 20), slice(20, 50)):
        moments.add(x[rows], y[rows])
    together = torch.cov(torch.cat([x, y], 1).T, correction=0)
    torch.testing.assert_close(moments.covariance, together[:3, :3])
    torch.testing.assert_close(moments.cross, together[3:, :3])
    torch.testing.assert_close(moments.variance_y, together[3:, 3:].diagonal())
    torch.testing.assert_close(moments.mean_x, x.mean(0))
    torch.testing.assert_close(moments.mean_y, y.mean(0))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 2), (2, 1), (0, 1), (1, 2)),
        ((1, 5), (1, 3), (0, 2), (1, 1)),
        ((2, 4), (1, 1), "same", (2, 1)),
        ((3, 3), (2, 2), "valid", (1, 1)),
    ],
)
def test_patches_times_weight_is_the_convolution(
    generator: torch.Generator,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
) -> None:
    x, weight = random(generator, 2, 3, 9, 11), random(generator, 5, 3, *kernel)
    y = F.conv2d(x, weight, None, stride, padding, dilation)
    positions = torch.randperm(y[:, 0].numel(), generator=generator)[:40]
    geometry = Geometry(stride, padding_sides(padding, (1, 1), kernel, stride, dilation), dilation)
    rows = patches(x, positions, (y.shape[2], y.shape[3]), kernel, geometry)
    torch.testing.assert_close(rows @ weight.flatten(1).T, pixels(y, positions))


@pytest.mark.parametrize("taps", [TAPS, 1])
@pytest.mark.parametrize("with_in", [True, False])
@pytest.mark.parametrize("with_out", [True, False])
def test_balanced_factors_are_the_same_weight_of_one_size(
    generator: torch.Generator, taps: int, with_in: bool, with_out: bool
) -> None:
    groups, mixed = (3 if with_in else C), (5 if with_out else K)
    factors = Factors(
        1e-4 * random(generator, groups, 2, taps),
        1e5 * random(generator, mixed, groups, 2),
        1e-3 * random(generator, groups, C) if with_in else None,
        10 * random(generator, K, mixed) if with_out else None,
    )
    factors.filters[1] *= 100
    made = factors.balanced()
    torch.testing.assert_close(made.dense(), factors.dense(), rtol=1e-12, atol=0)
    named = {name: value for name, value in made.named().items() if value is not None}
    if taps == 1 and with_in:
        assert bool((named.pop("weight_dw") == 1).all())
        named.pop("weight_out", None)  # no form has one there
    sizes = [float(value.square().mean().sqrt()) for value in named.values()]
    assert max(sizes) < 3 * min(sizes)


def test_what_is_zero_stays_and_can_learn(generator: torch.Generator) -> None:
    factors = Factors(random(generator, C, 2, TAPS), torch.zeros(K, C, 2).double())
    made = factors.balanced()
    assert torch.equal(made.filters, factors.filters)
    assert torch.equal(made.mixing, factors.mixing)


def test_moments_of_many_numbers_are_those_of_few_in_blocks() -> None:
    """Products are made by blocks of one triangle there."""
    x = torch.randn(50, 900, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    moments.add(x, x[:, :3])
    centred = x.double() - x.double().mean(0)
    torch.testing.assert_close(moments.covariance, centred.T @ centred / 50, rtol=1e-5, atol=1e-6)
    assert torch.equal(moments.covariance, moments.covariance.T)
