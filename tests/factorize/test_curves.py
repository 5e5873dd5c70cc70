"""Errors of many forms at once against each one's own, and the forms worth their cost."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sepconv.factorize import Form
from sepconv.factorize.curves import HeldOut, form_grid, hull, outline
from sepconv.factorize.knapsack import Option, knapsack
from sepconv.factorize.moments import Moments
from sepconv.factorize.solve import solve, whitened_filters
from sepconv.factorize.solve_form import Problem, input_map, solve_form
from sepconv.factorize.target import damped

K, C, TAPS, ROWS = 6, 4, 4, 300
FORMS = [
    Form(1),
    Form(3),
    Form(2, 2),
    Form(4, 3),
    Form(1, 3, 2),
    Form(4, 2, 3),
    Form(2, None, 3),
    Form(4, None, 5),
]


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def moments_of(x: Tensor, weight: Tensor) -> Moments:
    moments = Moments()
    moments.add(x, x @ weight.T)
    return moments


@pytest.fixture
def weight() -> Tensor:
    return random(0, K, C * TAPS)


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """To fit, and held out: of other means, and not all directions alike."""
    mixing = random(1, C * TAPS, C * TAPS)
    return random(2, ROWS, C * TAPS) @ mixing + 1, random(3, 90, C * TAPS) @ mixing + 1.5


def in_sample(problem: Problem) -> HeldOut:
    cross = problem.cross
    return HeldOut(problem.metric, cross, float((cross * problem.weight).sum()))


# Errors on other rows


def test_the_held_out_error_is_that_of_the_rows(
    weight: Tensor, rows: tuple[Tensor, Tensor]
) -> None:
    """With the bias that makes the mean of the fitted rows right."""
    fitted, held = (moments_of(x, weight) for x in rows)
    other = weight + 0.3 * random(4, K, C * TAPS)
    centred = rows[1] - rows[0].mean(0)
    wanted, found = centred @ weight.T, centred @ other.T
    expected = float((found - wanted).square().sum() / wanted.square().sum())
    held_out = HeldOut.of(weight, held, fitted)
    assert held_out.error(other) == pytest.approx(expected, rel=1e-9)
    assert held_out.error(weight) == pytest.approx(0, abs=1e-12)
    assert held_out.error(torch.zeros_like(weight)) == pytest.approx(1)


def test_rows_without_any_response_have_a_finite_error(weight: Tensor) -> None:
    still = moments_of(torch.zeros(5, C * TAPS, dtype=torch.float64), weight)
    assert HeldOut.of(weight, still, still).error(2 * weight) == 0


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_form_alone_has_the_error_of_its_closed_form(
    form: Form, weight: Tensor, rows: tuple[Tensor, Tensor]
) -> None:
    fitted, held = (moments_of(x, weight) for x in rows)
    problem = Problem.of(weight, damped(fitted.covariance))
    if form.is_plain:
        factors = solve(problem.weight, problem.metric, form.rank, TAPS, sweeps=0)
    else:
        factors = solve_form(problem, form, TAPS, 0)
    for part in (in_sample(problem), HeldOut.of(weight, held, fitted)):
        (found,) = outline(problem, part, TAPS, [form]).values()
        assert found == pytest.approx(part.error(factors.dense()), rel=1e-5)


def test_forms_together_have_the_least_error_in_their_nested_bases(
    weight: Tensor, rows: tuple[Tensor, Tensor]
) -> None:
    fitted, held = (moments_of(x, weight) for x in rows)
    problem = Problem.of(weight, damped(fitted.covariance))
    held_out = HeldOut.of(weight, held, fitted)
    found = outline(problem, held_out, TAPS, FORMS)
    assert set(found) == set(FORMS)
    root = torch.linalg.cholesky(problem.metric)
    widest = input_map(problem, TAPS)[: max(form.rank_in or 0 for form in FORMS)]
    for form in FORMS:
        mapped = form.rank_in is not None
        reduced = problem.reduced(widest, TAPS) if mapped else problem
        filters = whitened_filters(reduced.weight, reduced.metric, TAPS, TAPS).flip(1)
        filters = filters[: form.rank_in, : form.rank]
        maps = widest[: form.rank_in] if mapped else torch.eye(C, dtype=torch.float64)
        basis = torch.einsum("gtr,gc->gtcr", filters, maps).flatten(2).flatten(0, 1)
        target = weight @ root
        mixing = torch.linalg.lstsq((basis @ root).T, target.T).solution.T
        made = mixing @ basis @ root
        if form.rank_out is not None:
            left = torch.linalg.svd(made)[0][:, : form.rank_out]
            made = left @ left.T @ made
        expected = held_out.error(torch.linalg.solve(root.T, made.T).T)
        assert found[form] == pytest.approx(expected, rel=1e-5), form


def test_long_patches_are_outlined_in_float32(
    weight: Tensor, rows: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, held = (moments_of(x, weight) for x in rows)
    problem, held_out = (
        Problem.of(weight, damped(fitted.covariance)),
        HeldOut.of(weight, held, fitted),
    )
    wide = outline(problem, held_out, TAPS, FORMS)
    monkeypatch.setattr("sepconv.factorize.symmetric.NARROW_FROM", C * TAPS)
    narrow = outline(problem, held_out, TAPS, FORMS)
    assert narrow != wide, "or it would show nothing"
    assert narrow == pytest.approx(wide, rel=1e-3)


def test_a_few_rows_look_better_than_others_do(weight: Tensor) -> None:
    """What the errors are held out for."""
    mixing = random(1, C * TAPS, C * TAPS)
    few, many = (moments_of(random(n, n, C * TAPS) @ mixing, weight) for n in (10, 2000))
    problem = Problem.of(weight, damped(few.covariance))
    forms = [Form(1, 2), Form(2, 2), Form(1), Form(2, 3, 3)]
    apart = outline(problem, HeldOut.of(weight, many, few), TAPS, forms)
    same = outline(problem, HeldOut.of(weight, few, few), TAPS, forms)
    assert all(apart[form] > 1.2 * same[form] for form in forms)


@pytest.mark.parametrize("rank_in", [1, 2, 3])
def test_1x1_convolutions_are_outlined_too(rank_in: int) -> None:
    weight = random(0, 5, 4)
    metric = damped(random(1, 4, 4) @ random(1, 4, 4).T)
    problem = Problem.of(weight, metric)
    forms = [Form(1, g) for g in (1, 2, 3)]
    found = outline(problem, in_sample(problem), 1, forms)[Form(1, rank_in)]
    values = torch.linalg.svdvals(weight @ torch.linalg.cholesky(metric)).square()
    expected = float(values[rank_in:].sum() / values.sum())
    assert found == pytest.approx(expected, rel=1e-6)


# Which forms


@given(
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.lists(st.integers(1, 7), min_size=1, max_size=2),
)
def test_the_grid_has_each_form_once_and_none_too_large(
    channels: tuple[int, int], taps: list[int]
) -> None:
    shape = (*channels, *taps)
    size = torch.Size(taps).numel()
    forms = form_grid(shape)
    assert len(set(forms)) == len(forms)
    assert all(form.within(shape) == form for form in forms if size > 1)
    assert all(form.rank_in is None or 2 <= form.rank_in <= channels[1] for form in forms)
    assert all(form.rank_out is None or form.rank_out < channels[0] for form in forms)
    if size == 1:
        assert all(form.rank_in and form.rank_in <= min(channels) for form in forms)
    else:
        full = min(channels[0], size)
        plain = [form.rank for form in forms if form.is_plain]
        assert set(range(1, min(full, 8) + 1)) | {full} <= set(plain)


def test_the_grid_has_forms_of_every_kind() -> None:
    forms = form_grid((64, 64, 3, 3))
    kinds = {(form.rank_in is None, form.rank_out is None) for form in forms}
    assert len(kinds) == 4


points = st.lists(
    st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=12, unique=True
)


def as_forms(some: list[tuple[int, int]]) -> tuple[dict[Form, float], dict[Form, float]]:
    forms = [Form(i + 1) for i in range(len(some))]
    costs = {form: float(cost) for form, (cost, _) in zip(forms, some, strict=True)}
    return costs, {form: error / 30 for form, (_, error) in zip(forms, some, strict=True)}


@given(points, st.integers(2, 35))
def test_no_form_is_below_the_hull(some: list[tuple[int, int]], dense: int) -> None:
    costs, errors = as_forms(some)
    found = hull(costs, errors, float(dense))
    corners = [(costs[form], errors[form]) for form in found]
    assert corners == sorted(corners)
    assert len(set(corners)) == len(corners)
    assert all(cost < dense for cost, _ in corners)
    line = [*corners, (float(dense), 0.0)]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(line)]
    assert all(a <= b + 1e-9 for a, b in pairwise(slopes))
    assert all(slope <= 0 for slope in slopes)
    for form, cost in costs.items():
        if cost >= dense:
            continue
        assert cost >= line[0][0], "the cheapest form is a corner"
        for (at, high), (to, low) in pairwise(line):
            if at <= cost <= to:
                along = high + (low - high) * (cost - at) / (to - at)
                assert errors[form] >= along - 1e-12


@given(st.lists(points, min_size=1, max_size=3), st.data())
def test_the_hull_is_enough_for_budgets_at_its_corners(
    layers: list[list[tuple[int, int]]], data: st.DataObject
) -> None:
    """Where a line of one slope touches every layer's hull, no other form does better."""
    dense = 31.0
    every, corners = [], []
    for some in layers:
        costs, errors = as_forms(some)
        last = Option(dense, 0.0)
        every.append([*(Option(costs[form], errors[form]) for form in costs), last])
        kept = hull(costs, errors, dense)
        corners.append([*(Option(costs[form], errors[form]) for form in kept), last])
    price = data.draw(st.floats(0, 1))
    touched = [min(layer, key=lambda o: o.error + price * o.cost) for layer in corners]
    limit = sum(option.cost for option in touched)

    def least(options: list[list[Option]]) -> float:
        chosen = knapsack(options, limit, least_unit=1)
        return sum(layer[i].error for layer, i in zip(options, chosen, strict=True))

    assert least(corners) == pytest.approx(least(every), abs=1e-9)
