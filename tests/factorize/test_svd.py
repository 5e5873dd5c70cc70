"""Weight factorisation against torch's own SVD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sepconv.factorize import SeparableFactors, factorize, full_rank, weight_errors


def rebuilt(factors: SeparableFactors, like: Tensor) -> Tensor:
    """The dense weight [K, C, R, S] of the factors, in float64."""
    k, c = like.shape[:2]
    depthwise = factors.weight_dw.double().reshape(c, -1, *like.shape[2:])
    pointwise = factors.weight_pw.double().reshape(k, c, -1)
    return torch.einsum("kct,ctrs->kcrs", pointwise, depthwise)


def best_error(weight: Tensor, rank: int) -> float:
    """Eckart and Young: the smallest relative error that any factors of this rank can have."""
    values = torch.linalg.svdvals(weight.double().flatten(2).transpose(0, 1))
    return float(values[:, rank:].norm() / values.norm())


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    shape = (
        draw(st.integers(1, 12)),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):  # of low rank
        low = torch.randn(shape[1], shape[0], 1, generator=generator, dtype=torch.float64)
        weight = (low @ weight.flatten(2).transpose(0, 1)[:, :1]).transpose(0, 1).reshape(shape)
    return weight * 10.0 ** draw(st.integers(-20, 20))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(weights(), st.integers(1, 17))
def test_factors_are_optimal_and_their_error_is_told(weight: Tensor, rank: int) -> None:
    factors = factorize(weight, rank)
    kept = min(rank, full_rank(weight.shape))
    k, c, r, s = weight.shape
    assert factors.weight_dw.shape == (c * kept, 1, r, s)
    assert factors.weight_pw.shape == (k, c * kept, 1, 1)
    error = float((rebuilt(factors, weight) - weight).norm() / weight.norm())
    # Gram matrices square the singular values: half of float64's digits remain of the small ones.
    assert error == pytest.approx(best_error(weight, kept), abs=1e-7)
    assert factors.error == pytest.approx(error, abs=1e-7)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(weights())
def test_errors_of_all_ranks_fall_convexly_from_one_to_zero(weight: Tensor) -> None:
    errors = weight_errors(weight)
    assert errors.shape == (full_rank(weight.shape) + 1,)
    assert errors.dtype == torch.float64
    assert (float(errors[0]), float(errors[-1])) == (1.0, 0.0)
    falls = errors[:-1] - errors[1:]
    assert bool((falls >= -1e-12).all())
    assert bool((falls[:-1] - falls[1:] >= -1e-12).all())
    for rank in range(1, len(errors)):
        assert float(errors[rank]) == pytest.approx(best_error(weight, rank) ** 2, abs=1e-12)


@pytest.mark.parametrize("shape", [(16, 4, 3, 3), (4, 5, 3, 3), (9, 2, 3, 3), (1, 3, 5, 2)])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_full_rank_is_exact_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    for rank in (full_rank(shape), full_rank(shape) + 1, 1000):
        factors = factorize(weight, rank)
        assert factors.error == 0.0
        assert factors.weight_dw.dtype == factors.weight_pw.dtype == dtype
        assert torch.equal(rebuilt(factors, weight).to(dtype), weight)
        assert factors.weight_dw.shape[0] == shape[1] * full_rank(shape)
    canonical = factors.weight_dw if shape[0] >= shape[2] * shape[3] else factors.weight_pw
    assert set(canonical.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_factorised_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 8, 3, 3).to(dtype)
    factors = factorize(weight, 3)
    exact = factorize(weight.double(), 3)
    assert factors.error == pytest.approx(exact.error, rel=1e-9)
    assert torch.equal(factors.weight_dw, exact.weight_dw.to(dtype))
    assert torch.equal(factors.weight_pw, exact.weight_pw.to(dtype))


@pytest.mark.parametrize("channels", [63, 64, 65, 130])
def test_channels_are_independent(channels: int) -> None:
    """However many are taken at a time."""
    torch.manual_seed(0)
    weight = torch.randn(10, channels, 3, 3, dtype=torch.float64)
    factors = factorize(weight, 2)
    for c in (0, channels // 2, channels - 1):
        alone = factorize(weight[:, c : c + 1], 2)
        assert torch.allclose(rebuilt(factors, weight)[:, c : c + 1], rebuilt(alone, weight[:, :1]))
    assert factors.error == pytest.approx(best_error(weight, 2), abs=1e-9)


def test_extreme_scales_neither_overflow_nor_vanish() -> None:
    torch.manual_seed(0)
    unit = torch.randn(12, 3, 3, 3)
    for scale in (1e-30, 1e-12, 1e12, 1e30):
        factors = factorize(unit * scale, 2)
        assert factors.error == pytest.approx(best_error(unit, 2), rel=1e-5)
        error = (rebuilt(factors, unit) - (unit * scale).double()).norm() / (
            unit * scale
        ).double().norm()
        assert float(error) == pytest.approx(best_error(unit, 2), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_a_weight_of_zeros_has_no_error(rank: int) -> None:
    weight = torch.zeros(16, 2, 3, 3)
    factors = factorize(weight, rank)
    assert factors.error == 0.0
    assert torch.equal(rebuilt(factors, weight), weight.double())
    assert bool(torch.isfinite(factors.weight_dw).all())


@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (4, 3, 3, 3)])
def test_channels_of_zeros_stay_zeros(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[:, 1] = 0
    for rank in (1, 2, full_rank(shape)):
        factors = factorize(weight, rank)
        assert bool((rebuilt(factors, weight)[:, 1] == 0).all())
        assert bool(torch.isfinite(factors.weight_dw).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.ones(4, 2, 3, 3)
    weight[1, 1, 1, 1] = bad
    for call in (lambda: factorize(weight, 1), lambda: weight_errors(weight)):
        with pytest.raises(ValueError, match=r"weight.*finite"):
            call()


@pytest.mark.parametrize("rank", [0, -1, 1.0, True, "full", None])
def test_ranks_that_are_none_are_refused(rank: object) -> None:
    with pytest.raises(ValueError, match="rank"):
        factorize(torch.ones(4, 2, 3, 3), rank)


@pytest.mark.parametrize("weight", [torch.ones(4, 2, 3), torch.ones(4, 2, 3, 3, dtype=torch.int64)])
def test_other_weights_are_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="weight"):
        factorize(weight, 1)


def test_the_weight_and_its_gradient_are_left_alone() -> None:
    weight = torch.nn.Parameter(torch.randn(12, 3, 3, 3))
    before = weight.detach().clone()
    for rank in (2, 9):
        factors = factorize(weight, rank)
        assert not factors.weight_dw.requires_grad
        assert not factors.weight_pw.requires_grad
        factors.weight_dw.zero_()
        factors.weight_pw.zero_()
    assert torch.equal(weight, before)
