"""The dense convolution of a fused separable one: the same numbers, or none."""

from itertools import product

import pytest
import torch
from torch import nn

from sepconv.nn import FusedConv2d, FusedSeparableConv2d, FusedTuckerConv2d, SeparableConv2d
from sepconv.nn.composed import composed
from sepconv.nn.lowered import fused_separable


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(module: nn.Module, x: torch.Tensor) -> None:
    dense = composed(module, x.shape[1])
    assert isinstance(dense, FusedConv2d)
    expected = module(x)
    residual = drawn(*expected.shape)
    for got, wanted in ((dense(x), expected), (dense(x, residual), module(x, residual))):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert got.stride() == wanted.stride()
        assert got.dtype == wanted.dtype


@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 2, 1, 0), "same", "keras"])
def test_separable(sets, stride, padding):
    for biased, activation, channels_last in product((0, 1), (None, "silu"), (True, False)):
        biases = (drawn(4 * sets), drawn(6)) if biased else (None, None)
        factors = drawn(4 * sets, 1, 3, 3), drawn(6, 4 * sets, 1, 1)
        geometry = (stride, padding, (1, 2))
        tail = (None, activation, channels_last)
        check(FusedSeparableConv2d(*factors, *biases, *geometry, *tail), drawn(2, 4, 9, 8))


@pytest.mark.parametrize(("rank_in", "rank_out"), [(2, None), (None, 3), (2, 3)])
def test_ranks_of_channels(rank_in, rank_out):
    ranks = {"channel_multiplier": 2, "rank_in": rank_in, "rank_out": rank_out}
    check_lowered(SeparableConv2d(4, 6, 3, 2, 1, **ranks))


def test_two_pointwise_convolutions():
    check_lowered(SeparableConv2d(4, 6, 1, 2, rank_in=2))


def check_lowered(conv: SeparableConv2d) -> None:
    *_, last = conv.factors.values()
    check(fused_separable(conv, last, conv.bias, "relu", True), drawn(2, 4, 9, 9))


def test_no_products_of_weights_alone():
    factors = drawn(4, 1, 3, 3), drawn(6, 4, 1, 1)
    assert composed(FusedSeparableConv2d(*factors, activation_mid="relu"), 4) is None
    assert composed(FusedConv2d(drawn(6, 4, 3, 3), None), 4) is None  # dense as it is
    assert composed(nn.Conv2d(4, 6, 3), 4) is None
    first, last = FusedConv2d(drawn(2, 4, 1, 1), None), FusedConv2d(drawn(6, 2, 1, 1), None)
    assert composed(FusedTuckerConv2d(first, last), 4) is not None
    biased = FusedConv2d(drawn(2, 4, 1, 1), drawn(2))
    assert composed(FusedTuckerConv2d(biased, last), 4) is None
    bent = FusedConv2d(drawn(2, 4, 1, 1), None, activation="relu")
    assert composed(FusedTuckerConv2d(bent, last), 4) is None
    grouped = FusedConv2d(drawn(6, 1, 1, 1), None, groups=2)
    assert composed(FusedTuckerConv2d(first, grouped), 4) is None
    spread = FusedConv2d(drawn(2, 4, 1, 1), None, padding=(1, 1, 1, 1))
    assert (
        composed(
            FusedTuckerConv2d(spread, FusedSeparableConv2d(drawn(2, 1, 3, 3), drawn(6, 2, 1, 1))), 4
        )
        is None
    )
