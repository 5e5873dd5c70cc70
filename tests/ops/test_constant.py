"""The operator of constant weights: the op's numbers, prepared once, for compiled graphs."""

import gc

import pytest
import torch

from sepconv.kernels.geometry import Geometry
from sepconv.ops import constant, onednn
from sepconv.ops.constant import constant_separable_conv2d
from sepconv.ops.reference import Epilogue, Weights, separable_conv2d


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [9, 1])
def test_values(stride, dtype, rows):
    geometry = Geometry(stride, (1, 1, 0, 1))
    x, dw, pw = drawn(2, 4, rows, 8), drawn(8, 1, 3, 2), drawn(6, 8, 1, 1)
    size = geometry.output_size(x.shape[2:], (3, 2))
    tensors = [t.to(dtype) for t in (x, dw, pw, drawn(8), drawn(6), drawn(2, 6, *size))]
    x, *weights, residual = tensors
    arguments = (x, *weights, *geometry, "relu", "silu", residual)
    got = constant_separable_conv2d(*arguments)
    expected = separable_conv2d(x, Weights(*weights), geometry, Epilogue("relu", "silu", residual))
    torch.testing.assert_close(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(constant_separable_conv2d, arguments)


@pytest.mark.skipif(onednn._OPERATORS is None, reason="needs a torch with oneDNN's operators")
def test_prepared_weights_live_as_long_as_the_weights():
    x, dw, pw = drawn(2, 4, 9, 8), drawn(8, 1, 3, 3), drawn(6, 8, 1, 1)
    before = len(constant._prepared)

    def check(stride, dw):
        geometry = Geometry((stride, stride))
        got = constant_separable_conv2d(x, dw, pw, None, None, *geometry, None, None, None)
        nothing = Epilogue(None, None, None)
        expected = separable_conv2d(x, Weights(dw, pw, None, None), geometry, nothing)
        torch.testing.assert_close(got, expected)

    for stride in (1, 2, 1):
        check(stride, dw)
    dw.mul_(2)
    check(1, dw)
    assert len(constant._prepared) == before + 1
    assert set(constant._prepared[dw]) == {1, 2}
    del dw
    gc.collect()
    assert len(constant._prepared) == before
