"""Factors with ranks of the channels, from the weight alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sepconv.factorize import Form, SeparableFactors, dense_weight, factorize
from sepconv.factorize.tucker import remix

SHAPE = (12, 8, 3, 3)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rebuilt(factors: SeparableFactors, form: Form, like: Tensor) -> Tensor:
    """The dense weight of the factors, in float64, as four convolutions would have it."""
    k, c = like.shape[:2]
    out = torch.eye(k) if factors.weight_out is None else factors.weight_out.flatten(1)
    first = torch.eye(c) if factors.weight_in is None else factors.weight_in.flatten(1)
    pointwise = factors.weight_pw.double().reshape(out.shape[1], len(first), form.rank)
    depthwise = factors.weight_dw.double().reshape(len(first), form.rank, *like.shape[2:])
    core = torch.einsum("hgt,gtrs->hgrs", pointwise, depthwise)
    return torch.einsum("kh,hgrs,gc->kcrs", out.double(), core, first.double())


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_factors_have_the_form_and_tell_their_error(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, most)) for most in (7, 6, 3, 3))
    asked = Form(
        data.draw(st.integers(1, 10)),
        data.draw(st.none() | st.integers(1, 8)),
        data.draw(st.none() | st.integers(1, 8)),
    )
    weight = random(*shape) * 10.0 ** data.draw(st.integers(-20, 20))
    form, factors = asked.within(shape), factorize(weight, asked)
    k, c, r, s = shape
    read, mixed = form.rank_in or c, form.rank_out or k
    assert factors.weight_dw.shape == (read * form.rank, 1, r, s)
    assert factors.weight_pw.shape == (mixed, read * form.rank, 1, 1)
    assert (factors.weight_in is None) == (form.rank_in is None)
    assert (factors.weight_out is None) == (form.rank_out is None)
    if factors.weight_in is not None:
        assert factors.weight_in.shape == (read, c, 1, 1)
    if factors.weight_out is not None:
        assert factors.weight_out.shape == (k, mixed, 1, 1)
    made = rebuilt(factors, form, weight)
    tensors = (factors.weight_dw, factors.weight_pw, factors.weight_in, factors.weight_out)
    assert torch.allclose(dense_weight(shape, form, *tensors), made, rtol=1e-9, atol=0)
    error = relative(made, weight)
    assert error == pytest.approx(factors.error, abs=1e-7)
    assert error <= 1 + 1e-9
    if asked.is_exact(shape):
        assert factors.error < 1e-12


def test_a_plain_form_is_a_rank() -> None:
    weight = random(*SHAPE).float()
    for rank in (1, 4, 9, 100):
        by_rank, by_form = factorize(weight, rank), factorize(weight, Form(rank))
        assert torch.equal(by_rank.weight_dw, by_form.weight_dw)
        assert torch.equal(by_rank.weight_pw, by_form.weight_pw)
        assert by_rank[2:] == by_form[2:] == (by_rank.error, None, None)


@pytest.mark.parametrize("form", [Form(9, 8, 12), Form(9, 20, 20), Form(9, None, 12)])
def test_full_ranks_are_exact(form: Form) -> None:
    weight = random(*SHAPE)
    factors = factorize(weight, form)
    assert factors.error == 0
    assert torch.equal(rebuilt(factors, form.within(SHAPE), weight), weight)


def test_a_weight_of_low_rank_in_its_channels_is_found() -> None:
    core = random(5, 4, 3, 3)
    weight = torch.einsum("kh,hgrs,gc->kcrs", random(12, 5), core, random(4, 8))
    assert factorize(weight, Form(9, 4, 5)).error < 1e-12
    assert factorize(weight, Form(9, 4)).error < 1e-12
    assert factorize(weight, Form(9, None, 5)).error < 1e-12
    assert factorize(weight, Form(9, 3, 5)).error > 1e-3


def test_errors_fall_with_each_rank() -> None:
    weight = random(*SHAPE)
    for forms in (
        [Form(9, n) for n in range(1, 8)],
        [Form(9, None, n) for n in range(1, 12)],
        [Form(n, 4, 6) for n in range(1, 7)],
    ):
        errors = [factorize(weight, form).error for form in forms]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("shape", [(12, 8, 1, 1), (5, 8, 1, 1)])
def test_a_1x1_weight_gets_its_truncated_svd(shape: tuple[int, ...]) -> None:
    weight = random(*shape)
    values = torch.linalg.svdvals(weight.flatten(1))
    for rank_in in range(1, 11):
        form = Form(1, rank_in).within(shape)
        factors = factorize(weight, Form(1, rank_in))
        best = float(values[rank_in:].norm() / values.norm())
        assert factors.error == pytest.approx(best, abs=1e-12)
        assert relative(rebuilt(factors, form, weight), weight) == pytest.approx(best, abs=1e-12)
        if form.rank_in is not None:
            assert torch.equal(factors.weight_dw, torch.ones(form.rank_in, 1, 1, 1).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_have_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight = random(*SHAPE).to(dtype).requires_grad_()
    for form in (Form(2, 4, 6), Form(2, 4), Form(2, None, 6)):
        factors = factorize(weight, form)
        tensors = [t for t in factors if isinstance(t, Tensor)]
        assert {t.dtype for t in tensors} == {dtype}
        assert all(t.is_contiguous() and not t.requires_grad for t in tensors)
        made = rebuilt(factors, form, weight.detach())
        assert relative(made, weight.detach().double()) == pytest.approx(factors.error, abs=0.01)


@pytest.mark.parametrize("weight", [torch.zeros(12, 8, 3, 3), torch.zeros(12, 8, 1, 1)])
def test_a_weight_of_zeros(weight: Tensor) -> None:
    factors = factorize(weight, Form(1, 4))
    assert factors.error == 0
    assert not rebuilt(factors, Form(1, 4), weight).any()


def test_what_cannot_be_factorised_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank.*Form"):
        factorize(random(*SHAPE), "full")
    for weight in (random(4, 2, 3), torch.full(SHAPE, torch.nan)):
        with pytest.raises(ValueError, match="weight"):
            factorize(weight, Form(1, 2))


@pytest.mark.parametrize("form", [Form(2, 4, 6), Form(2, 4), Form(2, None, 6), Form(3, 8, 20)])
def test_given_factors_are_kept_and_what_follows_them_is_the_best(form: Form) -> None:
    made = factorize(random(*SHAPE), form)
    inner, within = (made.weight_in, made.weight_dw), form.within(SHAPE)
    tensors = (made.weight_dw, made.weight_pw, made.weight_in, made.weight_out)
    weight = dense_weight(SHAPE, within, *tensors) * random(12, 1, 1, 1)
    kept = remix(weight, within, *inner)
    assert kept.error < 1e-13
    assert torch.equal(kept.weight_dw, made.weight_dw)
    other = random(*SHAPE).flip(0)
    best = remix(other, Form(form.rank, within.rank_in), *inner)
    residual = other - rebuilt(best, within, other)
    moved = best._replace(weight_pw=random(*best.weight_pw.shape))
    step = rebuilt(moved, within, other)
    assert abs(float((residual * step).sum())) < 1e-9 * float(residual.norm() * step.norm())


# Forms


def test_form_shows_its_ranks() -> None:
    assert [str(f) for f in (Form(2), Form(2, 8), Form(2, None, 9), Form(2, 8, 9))] == [
        "2",
        "8>2>",
        ">2>9",
        "8>2>9",
    ]


@pytest.mark.parametrize("ranks", [(0,), (1.0,), (True,), (1, 0), (1, None, -1), (1, "8")])
def test_ranks_that_are_none_are_refused(ranks: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="Form: expected rank"):
        Form(*ranks)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_what_is_within_a_weight_stays_within_it(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, most)) for most in (9, 9, 3, 3))
    ranks = (st.integers(1, 12), st.none() | st.integers(1, 12), st.none() | st.integers(1, 12))
    form = Form(*map(data.draw, ranks))
    within = form.within(shape)
    assert within.within(shape) == within
    assert within.rank <= form.rank
    assert (within.rank_in or 0) <= min(form.rank_in or 0, shape[1])
    assert (within.rank_out or 0) <= min(form.rank_out or 0, shape[0])
    factors = factorize(random(*shape), within)
    sizes = [t.numel() for t in factors if isinstance(t, Tensor)]
    spared = len(factors.weight_dw) if shape[2:] == (1, 1) and within.rank_in else 0
    assert sum(sizes) - spared == within.params(shape)
