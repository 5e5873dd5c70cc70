"""Factors with ranks of the channels in the metric of the data, against brute force."""

from itertools import pairwise
from math import prod

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from sepconv.factorize import Form
from sepconv.factorize.curves import HeldOut, outline
from sepconv.factorize.solve import Factors, solve
from sepconv.factorize.solve_form import Problem, _Search, input_map, solve_form
from sepconv.factorize.target import damped

K, C, TAPS = 5, 4, 4
STEPS = 30
# Which parts are searched for: the map, the filters, both; with and without an output map.
FORMS = [
    Form(2, 2),
    Form(1, 3),
    Form(2, 4),  # the map is square: it turns the channels
    Form(2, None, 3),
    Form(1, None, 2),
    Form(2, 3, 3),
    Form(1, 2, 1),
    Form(4, 2),
    Form(4, 3, 3),
]


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_metric(seed: int, size: int = C * TAPS) -> Tensor:
    """Of correlated inputs with variances of several orders."""
    mixing = random(seed, size, 2 * size) * torch.logspace(0, -1, 2 * size, dtype=torch.float64)
    return damped(mixing @ mixing.T)


def problem_of(seed: int, white: bool = False) -> Problem:
    size = C * TAPS
    metric = torch.eye(size, dtype=torch.float64) if white else random_metric(seed + 100)
    return Problem.of(random(seed, K, size), metric)


def energy(problem: Problem, weight: Tensor) -> float:
    return float(((weight @ problem.metric) * weight).sum())


def error(problem: Problem, factors: Factors) -> float:
    """J of `sepconv.factorize.solve_form`, relative to that of a weight of zeros."""
    lost = energy(problem, problem.weight - factors.dense())
    return lost / max(energy(problem, problem.weight), 1e-300)


def solved(problem: Problem, form: Form, steps: int = STEPS, taps: int = TAPS) -> float:
    return error(problem, solve_form(problem, form, taps, steps))


def in_sample(problem: Problem) -> HeldOut:
    """The moments that are fitted, as if they were held out."""
    return HeldOut(problem.metric, problem.cross, energy(problem, problem.weight))


# Against brute force


def shapes_of(form: Form) -> list[tuple[int, ...]]:
    """Of A, D, P and E; as wide as the channels where the form has no such map."""
    rank_in, rank_out = form.rank_in or C, form.rank_out or K
    return [(rank_in, C), (rank_in, form.rank, TAPS), (rank_out, rank_in, form.rank), (K, rank_out)]


def flat(factors: Factors) -> Tensor:
    filters, mixing, first, last = factors
    first = torch.eye(C, dtype=torch.float64) if first is None else first
    last = torch.eye(K, dtype=torch.float64) if last is None else last
    return torch.cat([part.flatten() for part in (first, filters, mixing, last)])


def fitted_from(problem: Problem, form: Form, point: Tensor, steps: int) -> Tensor:
    """Errors after Levenberg and Marquardt's method on all factors at once, the least first."""
    shapes = shapes_of(form)
    root = torch.linalg.cholesky(problem.metric)
    wanted = problem.weight @ root

    def residual(numbers: Tensor) -> Tensor:
        first, filters, mixing, last = (
            part.view(shape)
            for part, shape in zip(numbers.split([prod(s) for s in shapes]), shapes, strict=True)
        )
        first = first if form.rank_in else torch.eye(C, dtype=numbers.dtype)
        last = last if form.rank_out else torch.eye(K, dtype=numbers.dtype)
        made = torch.einsum("ko,ogt,gtr,gc->kcr", last, mixing, filters, first).flatten(1)
        return (made @ root - wanted).flatten()

    damping = torch.ones(len(point), 1, 1, dtype=torch.float64)
    each, jacobian = vmap(residual), vmap(jacrev(residual))
    now = each(point)
    for _ in range(steps):
        slope = jacobian(point)
        normal = slope.mT @ slope + damping * torch.eye(point.shape[1], dtype=torch.float64)
        move = torch.linalg.solve(normal, slope.mT @ now[..., None])[..., 0]
        tried = each(point - move)
        better = tried.square().sum(1) < now.square().sum(1)
        point = torch.where(better[:, None], point - move, point)
        now = torch.where(better[:, None], tried, now)
        damping = torch.where(better[:, None, None], damping / 4, damping * 3).clamp(min=1e-9)
    return now.square().sum(1).sort().values / energy(problem, problem.weight)


def of_random_starts(problem: Problem, form: Form, starts: int = 12, steps: int = 40) -> Tensor:
    return fitted_from(problem, form, random(5, starts, sum(map(prod, shapes_of(form)))), steps)


@pytest.mark.parametrize("white", [False, True], ids=["correlated", "white"])
@pytest.mark.parametrize(
    "form",
    [Form(2, None, 3), Form(1, None, 2), Form(1, 2, 1), Form(TAPS, 2), Form(TAPS, 3, 3)],
    ids=str,
)
def test_no_random_start_ends_clearly_lower(form: Form, white: bool) -> None:
    """Where one of the two, map or filters, is not searched for, or outputs are few."""
    problem = problem_of(0, white)
    best = float(of_random_starts(problem, form)[0])
    assert 0.99 * best <= solved(problem, form, steps=200) <= 1.02 * best


@pytest.mark.parametrize("form", [Form(2, 2), Form(1, 3), Form(2, C), Form(2, 3, 3)], ids=str)
def test_the_start_is_at_least_as_good_as_a_random_one(form: Form) -> None:
    """With map and filters there are many local minima, and the search ends in one of them."""
    ratios = []
    for seed in range(3):
        problem = problem_of(seed)
        starts = of_random_starts(problem, form)
        found = solved(problem, form, steps=200)
        assert found >= 0.99 * float(starts[0])
        ratios.append(found / float(starts[len(starts) // 2]))
    assert prod(ratios) ** (1 / len(ratios)) < 1.05, ratios


@pytest.mark.parametrize("white", [False, True], ids=["correlated", "white"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_search_ends_at_a_minimum(form: Form, white: bool) -> None:
    """Another method, on all factors and from there on, gains next to nothing.

    A square map starts where plain ranks do; from there some ways down begin flat.
    """
    share = 0.85 if form.rank_in == C else 0.98
    for seed in range(3):
        problem = problem_of(seed, white)
        factors = solve_form(problem, form, TAPS, 200)
        further = float(fitted_from(problem, form, flat(factors)[None], 20)[0])
        assert further >= share * error(problem, factors), seed


@pytest.mark.parametrize("white", [False, True], ids=["correlated", "white"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_search_never_ends_above_the_closed_forms(form: Form, white: bool) -> None:
    for seed in range(5):
        problem = problem_of(seed, white)
        closed = solved(problem, form, steps=0)
        assert solved(problem, form, steps=10) <= closed * (1 + 1e-9)
        assert solved(problem, form, steps=STEPS) <= closed * (1 + 1e-9)


def test_a_search_pays() -> None:
    """Else the test above would pass with none."""
    problem = problem_of(0)
    for form in (Form(2, 2), Form(2, None, 3), Form(1, 3, 3)):
        assert solved(problem, form) < 0.98 * solved(problem, form, steps=0)


# Where the minimum is known


@pytest.mark.parametrize("steps", [0, STEPS])
@pytest.mark.parametrize("rank_in", [1, 2, 3])
def test_white_channels_are_mapped_as_by_a_truncated_svd(rank_in: int, steps: int) -> None:
    problem = problem_of(0, white=True)
    by_channel = problem.weight.unflatten(1, (C, TAPS)).transpose(1, 2).flatten(0, 1)
    left = torch.linalg.svdvals(by_channel)[rank_in:].square().sum()
    found = solved(problem, Form(TAPS, rank_in), steps)
    assert found == pytest.approx(float(left) / energy(problem, problem.weight), rel=1e-7)


@pytest.mark.parametrize("rank_out", [1, 2, 4])
def test_outputs_alone_are_reduced_rank_regression(rank_out: int) -> None:
    problem = problem_of(1)
    response = problem.weight @ torch.linalg.cholesky(problem.metric)
    left = torch.linalg.svdvals(response)[rank_out:].square().sum()
    found = solved(problem, Form(TAPS, None, rank_out))
    assert found == pytest.approx(float(left) / energy(problem, problem.weight), rel=1e-7)


@pytest.mark.parametrize(("outputs", "channels"), [(5, 7), (7, 5)])
@pytest.mark.parametrize("rank_in", [1, 3, 4])
def test_a_1x1_convolution_is_reduced_rank_regression(
    outputs: int, channels: int, rank_in: int
) -> None:
    problem = Problem.of(random(0, outputs, channels), random_metric(1, channels))
    factors = solve_form(problem, Form(1, rank_in), 1, STEPS)
    left, values, right = torch.linalg.svd(
        problem.weight @ torch.linalg.cholesky(problem.metric), full_matrices=False
    )
    kept = left[:, :rank_in] * values[:rank_in] @ right[:rank_in]
    expected = torch.linalg.solve_triangular(
        torch.linalg.cholesky(problem.metric), kept, upper=False, left=False
    )
    torch.testing.assert_close(factors.dense(), expected, rtol=1e-7, atol=1e-9)
    assert [None if f is None else tuple(f.shape) for f in factors] == [
        (rank_in, 1, 1),
        (outputs, rank_in, 1),
        (rank_in, channels),
        None,
    ]


@pytest.mark.parametrize(
    "form", [Form(TAPS, C), Form(TAPS, None, K), Form(TAPS, C, K), Form(TAPS + 2, C, K)], ids=str
)
@pytest.mark.parametrize("steps", [0, STEPS])
def test_full_ranks_are_exact(form: Form, steps: int) -> None:
    for seed in range(3):
        problem = problem_of(seed)
        assert abs(solved(problem, form, steps)) < 1e-9


@pytest.mark.parametrize("steps", [0, STEPS])
def test_a_weight_that_has_the_ranks_is_found(steps: int) -> None:
    """The closed forms know the spaces that a weight of low ranks reads and writes."""
    taps, metric = 4, random_metric(2)
    core = torch.einsum("ko,ogt,gc->kct", random(1, K, 3), random(2, 3, 2, taps), random(3, 2, C))
    problem = Problem.of(core.flatten(1), metric)
    for form in (Form(taps, 2), Form(taps, None, 3), Form(taps, 2, 3)):
        assert abs(solved(problem, form, steps)) < 1e-9
        assert solved(problem, Form(taps, 1), steps) > 1e-3
        assert solved(problem, Form(taps, None, 2), steps) > 1e-3


def test_a_search_finds_a_weight_that_has_the_filters() -> None:
    filters, mixing = random(1, 2, 1, TAPS), random(2, K, 2, 1)
    weight = torch.einsum("kgt,gtr,gc->kcr", mixing, filters, random(3, 2, C)).flatten(1)
    problem = Problem.of(weight, random_metric(4))
    assert solved(problem, Form(1, 2), steps=200) < 1e-3


# The map


def test_the_map_makes_channels_white_and_orders_them_by_what_is_read() -> None:
    problem = problem_of(0)
    rows = input_map(problem, TAPS)
    blocks = problem.metric.view(C, TAPS, C, TAPS)
    covariance = blocks.diagonal(dim1=1, dim2=3).mean(-1)
    identity = torch.eye(C, dtype=torch.float64)
    torch.testing.assert_close(rows @ covariance @ rows.T, identity, rtol=1e-9, atol=1e-9)
    back = torch.linalg.inv(rows)  # x = back z
    by_tap = problem.weight.unflatten(1, (C, TAPS))
    read = torch.einsum("kct,cg->kgt", by_tap, back).square().sum((0, 2))
    assert all(a > b for a, b in pairwise(read.tolist()))


@pytest.mark.parametrize("rank_in", [1, 3, C])
def test_moments_of_mapped_channels_are_those_of_mapped_rows(rank_in: int) -> None:
    rows, weight_in = random(0, 50, C, TAPS), random(1, rank_in, C)
    metric = rows.flatten(1).T @ rows.flatten(1) / 50
    problem = Problem.of(random(2, K, C * TAPS), damped(metric))
    within = torch.einsum("nct,gc->ngt", rows, weight_in).flatten(1)
    ridge = problem.metric - metric
    mapping = torch.kron(weight_in, torch.eye(TAPS, dtype=torch.float64))
    reduced = problem.reduced(weight_in, TAPS)
    expected = within.T @ within / 50 + mapping @ ridge @ mapping.T
    torch.testing.assert_close(reduced.metric, expected)
    cross = problem.weight @ problem.metric @ mapping.T
    best = torch.linalg.solve(reduced.metric, cross.T).T
    torch.testing.assert_close(reduced.weight, best, rtol=1e-5, atol=1e-7)


# More of any rank


def growing(rank: str) -> list[list[Form]]:
    if rank == "rank":
        return [
            [Form(t, rank_in, rank_out) for t in (1, 2, 3, 4)]
            for rank_in in (None, 2, 3)
            for rank_out in (None, 4)
        ]
    if rank == "rank_in":
        return [
            [Form(t, g, rank_out) for g in (1, 2, 3, 4)]
            for t in (1, 2, 4)
            for rank_out in (None, 4)
        ]
    return [
        [Form(t, rank_in, o) for o in (1, 2, 3, 4, None)]
        for t in (1, 2, 4)
        for rank_in in (None, 3)
    ]


@pytest.mark.parametrize("rank", ["rank", "rank_in"])
def test_closed_forms_of_more_ranks_have_less_error(rank: str) -> None:
    """On the rows that were fitted, in nested bases; outputs share what the others leave."""
    for seed in range(3):
        problem = problem_of(seed)
        for forms in growing(rank):
            errors = outline(problem, in_sample(problem), TAPS, forms)
            assert all(errors[b] < errors[a] for a, b in pairwise(forms)), errors


def test_closed_forms_of_more_outputs_have_less_error() -> None:
    for seed in range(3):
        problem = problem_of(seed)
        for forms in growing("rank_out"):
            errors = outline(problem, in_sample(problem), TAPS, forms)
            # The last step is none where no more outputs than channels are computed.
            assert all(errors[b] <= errors[a] + 1e-12 for a, b in pairwise(forms)), errors
            assert errors[forms[1]] < errors[forms[0]]


@pytest.mark.parametrize("rank", ["rank", "rank_in", "rank_out"])
def test_searched_forms_of_more_ranks_have_less_error(rank: str) -> None:
    problem = problem_of(1)
    for forms in growing(rank):
        fitted = [form for form in forms if not form.is_plain]
        errors = [solved(problem, form, steps=100) for form in fitted]
        assert all(b <= 1.01 * a + 1e-9 for a, b in pairwise(errors)), (fitted, errors)


def test_an_output_map_of_a_plain_rank_starts_from_its_filters() -> None:
    """With all outputs the closed form is that of the plain rank."""
    problem = problem_of(2)
    plain = error(problem, solve(problem.weight, problem.metric, 2, TAPS, sweeps=0))
    assert solved(problem, Form(2, None, K), steps=0) == pytest.approx(plain, rel=1e-6)


# The gradient


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("white", [False, True], ids=["correlated", "white"])
def test_the_gradient_is_that_of_finite_differences(form: Form, white: bool) -> None:
    problem = problem_of(6, white)
    search = _Search(problem, form, TAPS)
    search._set_coordinates()
    searched = ([] if form.rank_in is None else [(form.rank_in, C)]) + (
        [] if form.rank >= TAPS else [(form.rank_in or C, form.rank, TAPS)]
    )
    assert [tuple(free.shape) for free in search._free] == searched
    for i, free in enumerate(search._free):  # away from the start, where a map may be optimal
        free += 0.3 * free.square().mean().sqrt() * random(i, *free.shape)
    value = float(search._evaluate())
    assert value == pytest.approx(error(problem, search.run(0)), rel=1e-6)
    given = [free.grad.clone() for free in search._free]
    assert max(float(g.abs().max()) for g in given) > 1e-3
    step = 1e-5
    for free, gradient in zip(search._free, given, strict=True):
        flat = free.view(-1)
        for j in range(len(flat)):
            at, sides = float(flat[j]), []
            for sign in (1, -1):
                flat[j] = at + sign * step
                sides.append(float(search._evaluate()))
            flat[j] = at
            difference = (sides[0] - sides[1]) / (2 * step)
            assert float(gradient.view(-1)[j]) == pytest.approx(difference, rel=1e-5, abs=1e-7)


# Data that is not what one would wish


def dead(rows: Tensor) -> Tensor:
    rows[:, TAPS : 2 * TAPS] = 0
    return rows


def alike(rows: Tensor) -> Tensor:
    rows[:, :TAPS] = rows[:, TAPS : 2 * TAPS]
    return rows


def one_tap(rows: Tensor) -> Tensor:
    """As after a stride: some taps of every channel see nothing but padding."""
    rows[:, 1::2] = 0
    return rows


def constant(rows: Tensor) -> Tensor:
    return torch.zeros_like(rows)


def huge(rows: Tensor) -> Tensor:
    return 1e12 * rows


def tiny(rows: Tensor) -> Tensor:
    return 1e-12 * rows


ODD = (dead, alike, one_tap, constant, huge, tiny)
SOME = [Form(2, 2), Form(2, C), Form(2, None, 3), Form(1, 2, 2), Form(TAPS, 2), Form(TAPS, 3, 2)]


def check(problem: Problem, form: Form, taps: int = TAPS, slack: float = 1e-9) -> None:
    closed = solve_form(problem, form, taps, 0)
    factors = solve_form(problem, form, taps, STEPS)
    assert all(bool(torch.isfinite(f).all()) for f in factors if f is not None)
    assert error(problem, factors) <= error(problem, closed) * (1 + 1e-9) + slack
    assert error(problem, factors) <= 1 + 1e-9, "as good as zeros at least"


@pytest.mark.parametrize("form", SOME, ids=str)
@pytest.mark.parametrize("spoil", ODD)
def test_odd_inputs_are_survived(form: Form, spoil: object) -> None:
    rows = spoil(random(0, 200, C * TAPS) @ random(1, C * TAPS, C * TAPS))
    check(Problem.of(random(2, K, C * TAPS), damped(rows.T @ rows / 200)), form)


@pytest.mark.parametrize("form", [Form(2, 2), Form(2, 4, 3), Form(3, None, 3), Form(9, 2)], ids=str)
def test_fewer_rows_than_dimensions_are_survived(form: Form) -> None:
    rows = random(0, 10, 36)
    check(Problem.of(random(1, 12, 36), damped(rows.T @ rows / 10)), form, taps=9)


@pytest.mark.parametrize("form", SOME, ids=str)
def test_a_weight_of_zeros_stays_one(form: Form) -> None:
    problem = Problem.of(torch.zeros(K, C * TAPS, dtype=torch.float64), random_metric(0))
    made = solve_form(problem, form, TAPS, STEPS).dense()
    assert float(made.abs().max()) < 1e-12


@pytest.mark.parametrize("form", SOME, ids=str)
def test_outputs_and_channels_of_zeros_are_survived(form: Form) -> None:
    weight = random(0, K, C * TAPS)
    weight[1] = 0
    weight[:, -TAPS:] = 0
    check(Problem.of(weight, random_metric(1)), form)


@pytest.mark.parametrize("form", [Form(2, 2), Form(1, 3), Form(2, None, 2), Form(1, 2, 1)], ids=str)
def test_fewer_outputs_than_taps(form: Form) -> None:
    check(Problem.of(random(0, 2, C * 9), random_metric(1, C * 9)), form, taps=9)


def test_fewer_outputs_than_taps_at_the_full_rank() -> None:
    """A rank of K filters is full, though it is less than the taps; the map is still searched."""
    form = Form(9, 2).within((2, C, 3, 3))
    assert form == Form(2, 2)
    problem = Problem.of(random(0, 2, C * 9), random_metric(1, C * 9))
    taken = solved(problem, form, 100, taps=9)
    unlimited = solved(problem, Form(9, 2), 100, taps=9)
    assert taken == pytest.approx(unlimited, rel=0.02)


@pytest.mark.parametrize("narrow", [False, True], ids=["float64", "float32"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_unit_of_the_inputs_changes_no_weight(
    form: Form, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if narrow:
        monkeypatch.setattr("sepconv.factorize.symmetric.NARROW_FROM", 1)
    problem = problem_of(0)
    expected = solve_form(problem, form, TAPS, STEPS).dense()
    for power in (-80, -40, 40, 80):  # of two: so that nothing is rounded
        other = Problem.of(problem.weight, problem.metric * 2.0**power)
        found = solve_form(other, form, TAPS, STEPS).dense()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_same_bits_twice(form: Form) -> None:
    problem = problem_of(0)
    kept = problem.weight.clone(), problem.metric.clone()
    torch.manual_seed(1)
    first = solve_form(problem, form, TAPS, STEPS)
    torch.manual_seed(2)
    second = solve_form(problem, form, TAPS, STEPS)
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert torch.equal(problem.weight, kept[0])
    assert torch.equal(problem.metric, kept[1])


# In float32


WIDTH = 24


def realistic(seed: int) -> Problem:
    """Of 24 channels and 3x3 taps, whose variances fall by four orders, as in a network."""
    size = WIDTH * 9
    mixing = random(seed, size, size) * torch.logspace(0, -2, size, dtype=torch.float64)
    return Problem.of(random(seed + 1, 32, size), damped(mixing @ mixing.T / size))


NARROW = [
    Form(2, 12),
    Form(1, 8),
    Form(3, WIDTH),
    Form(2, None, 16),
    Form(2, 12, 16),
    Form(9, 12),
]


@pytest.mark.parametrize("form", NARROW, ids=str)
def test_a_search_in_float32_finds_as_small_an_error(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fewer channels there are more minima, and rounding may send it to another one."""
    wide = {seed: solved(realistic(seed), form, 100, taps=9) for seed in range(2)}
    casts = []
    cast = _Search._cast

    def told(self: _Search, dtype: torch.dtype) -> None:
        casts.append(dtype)
        cast(self, dtype)

    monkeypatch.setattr(_Search, "_cast", told)
    monkeypatch.setattr("sepconv.factorize.symmetric.NARROW_FROM", WIDTH * 9)
    ratios = []
    for seed, expected in wide.items():
        problem = realistic(seed)
        factors = solve_form(problem, form, 9, 100)
        assert {f.dtype for f in factors if f is not None} == {torch.float64}
        assert {t.dtype for t in problem} == {torch.float64}
        assert error(problem, factors) <= solved(problem, form, 0, taps=9) * (1 + 1e-6)
        ratios.append(error(problem, factors) / expected)
    assert casts[:2] == [torch.float32, torch.float64], "or it would show nothing"
    assert max(abs(ratio - 1) for ratio in ratios) < 0.01, ratios


@pytest.mark.parametrize("form", NARROW, ids=str)
def test_the_last_mixing_weights_are_the_best_in_float64(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the map and the filters that were found: no rounding of float32 is left in the error."""
    monkeypatch.setattr("sepconv.factorize.symmetric.NARROW_FROM", WIDTH * 9)
    problem = realistic(0)
    factors = solve_form(problem, form, 9, 100)
    first = (
        torch.eye(WIDTH, dtype=torch.float64) if factors.weight_in is None else factors.weight_in
    )
    basis = torch.einsum("gtr,gc->gtcr", factors.filters, first).flatten(2).flatten(0, 1)
    root = torch.linalg.cholesky(problem.metric)
    target = problem.weight @ root
    made = torch.linalg.lstsq((basis @ root).T, target.T).solution.T @ basis @ root
    if form.rank_out is not None:
        left = torch.linalg.svd(made)[0][:, : form.rank_out]
        made = left @ left.T @ made
    best = float((made - target).square().sum() / target.square().sum())
    assert error(problem, factors) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("spoil", ODD)
@pytest.mark.parametrize("form", SOME, ids=str)
def test_odd_inputs_are_survived_in_float32(
    form: Form, spoil: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sepconv.factorize.symmetric.NARROW_FROM", 1)
    rows = spoil(random(0, 200, C * TAPS) @ random(1, C * TAPS, C * TAPS))
    check(Problem.of(random(2, K, C * TAPS), damped(rows.T @ rows / 200)), form, slack=1e-6)
