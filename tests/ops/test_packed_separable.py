"""Separable convolutions by prepared weights: whole or in strips, the op's numbers."""

import copy
import pickle
from itertools import product

import pytest
import torch

from sepconv.kernels.geometry import Geometry
from sepconv.ops import onednn, packed_separable, strips
from sepconv.ops.packed_separable import PackedSeparableConv2d
from sepconv.ops.reference import Epilogue, Weights, separable_conv2d

needs_onednn = pytest.mark.skipif(
    onednn._OPERATORS is None, reason="needs a torch with oneDNN's operators"
)
PLAIN = (None, None), Epilogue(None, None, None)


@needs_onednn
@pytest.mark.parametrize("most", [0, 1500, 10_000, strips.STRIP_BYTES])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu", "hardswish", "gelu"])
@pytest.mark.parametrize("sides", [(1, 1, 1, 1), (0, 0, 0, 0), (0, 1, 1, 2), (3, 3, 2, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_values(monkeypatch, most, activation, sides, stride):
    torch.manual_seed(0)
    monkeypatch.setattr(strips, "STRIP_BYTES", most)
    geometry = Geometry((stride, stride), sides)
    x = torch.randn(3, 5, 11, 9)
    x[1, 2, 3, 4] = float("nan")
    conv = PackedSeparableConv2d(stride)
    for sets, biased, added in product((1, 2, 3), (False, True), (False, True)):
        dw, pw = torch.randn(5 * sets, 1, 3, 3), torch.randn(7, 5 * sets, 1, 1)
        biases = (torch.randn(5 * sets), torch.randn(7)) if biased else (None, None)
        residual = torch.randn(3, 7, *geometry.output_size((11, 9), (3, 3))) if added else None
        epilogue = Epilogue(activation, activation, residual)
        expected = separable_conv2d(x, Weights(dw, pw, *biases), geometry, epilogue)
        for _ in range(2):
            got = conv.prepared(x, dw, pw, sides)(x, biases, epilogue)
            assert got.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5, equal_nan=True)


@needs_onednn
def test_what_cannot_be_prepared():
    conv, dw, pw = PackedSeparableConv2d(1), torch.ones(8, 1, 3, 3), torch.ones(2, 8, 1, 1)
    sides, x = (0, 0, 0, 0), torch.ones(1, 4, 3, 3)
    assert conv.prepared(x, dw, pw, sides) is not None
    assert conv.prepared(torch.ones(1, 8, 3, 3), dw, pw, sides) is not None
    assert conv.prepared(torch.ones(1, 3, 3, 3), dw, pw, sides) is None  # 8 filters, 3 channels
    assert conv.prepared(torch.ones(1, 4, 2, 3), dw, pw, sides) is None  # no pixel
    assert conv.prepared(x, dw, pw[:, :4], sides) is None
    assert conv.prepared(x, dw.double(), pw, sides) is None
    with torch.inference_mode():
        assert conv.prepared(x, torch.ones(8, 1, 3, 3), pw, sides) is None


@needs_onednn
@pytest.mark.parametrize("most", [0, strips.STRIP_BYTES])
def test_weights_are_prepared_once_and_after_every_change(monkeypatch, most):
    torch.manual_seed(0)
    monkeypatch.setattr(strips, "STRIP_BYTES", most)
    x, dw, pw = torch.randn(1, 4, 6, 6), torch.randn(8, 1, 3, 3), torch.randn(3, 8, 1, 1)
    conv, sides = PackedSeparableConv2d(1), (1, 1, 1, 1)

    def check():
        geometry, nothing = Geometry((1, 1), sides), Epilogue(None, None, None)
        expected = separable_conv2d(x, Weights(dw, pw, None, None), geometry, nothing)
        torch.testing.assert_close(conv.prepared(x, dw, pw, sides)(x, *PLAIN), expected)

    check()
    with monkeypatch.context() as patched:
        patched.setattr(packed_separable, "pack", lambda *_: pytest.fail("packed again"))
        with torch.inference_mode():
            check()
    x = torch.randn(2, 4, 9, 7)
    check()
    assert len(conv._made.runs) == 2
    dw.mul_(2)
    check()
    pw.neg_()
    check()
    dw, pw = dw * 3, pw.flip(0)
    check()
    x, dw, pw = torch.randn(1, 2, 6, 6), dw[:4], pw[:, :4]
    check()
    dw, pw = dw[:2], pw[:, :2]  # the same memory, other shapes
    check()
    for copied in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert copied._made is None


@needs_onednn
@pytest.mark.parametrize("most", [0, strips.STRIP_BYTES])
def test_defaults_of_the_process_and_gradients_of_a_residual(monkeypatch, most):
    torch.manual_seed(0)
    monkeypatch.setattr(strips, "STRIP_BYTES", most)
    x, dw, pw = torch.randn(1, 4, 6, 6), torch.randn(8, 1, 3, 3), torch.randn(3, 8, 1, 1)
    run = PackedSeparableConv2d(1).prepared(x, dw, pw, (1, 1, 1, 1))
    expected = run(x, *PLAIN)
    torch.set_default_dtype(torch.float64)
    try:
        got = run(x, *PLAIN)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype is torch.float32
    assert torch.equal(got, expected)
    residual = torch.randn(1, 3, 6, 6, requires_grad=True)
    y = run(x, (None, torch.randn(3)), Epilogue(None, "relu", residual))
    y.sum().backward()
    assert torch.equal(residual.grad, (y > 0).float())
