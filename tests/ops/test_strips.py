"""Strips: every pixel once and in its place, whatever the strips; weights prepared once."""

import copy
import pickle
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sepconv.kernels.geometry import Geometry
from sepconv.ops import onednn, strips
from sepconv.ops.reference import Epilogue, Weights, separable_conv2d
from sepconv.ops.strips import StripedSeparableConv2d, strips_of

needs_onednn = pytest.mark.skipif(
    onednn._OPERATORS is None, reason="needs a torch with oneDNN's operators"
)


@given(
    n=st.integers(1, 5),
    h=st.integers(1, 40),
    q=st.integers(1, 9),
    taps=st.integers(1, 7),
    stride=st.integers(1, 4),
    padding=st.integers(0, 8),
    most=st.integers(0, 400),
)
def test_every_row_is_computed_once_from_the_rows_it_needs(n, h, q, taps, stride, padding, most):
    p = (h + 2 * padding - taps) // stride + 1
    if p < 1:
        return
    seen = []
    for strip in strips_of((n, h), (p, q), taps, stride, padding, most):
        (first, images), (top, rows) = strip.images, strip.rows
        assert 0 <= top <= top + rows <= h
        assert rows > 0
        skipped, kept = strip.kept
        given_rows = (rows + 2 * strip.padding - taps) // stride + 1
        assert skipped + kept <= given_rows
        assert strip.pixels[1] == images * kept * q
        assert images == 1 or kept == p
        if padding < taps:
            assert strip.pixels[1] <= 2 * max(most, q)
        for image, row in product(range(images), range(kept)):
            # What the convolution of the part reads, and what the whole one would.
            reads = range(
                top + (skipped + row) * stride - strip.padding,
                top + (skipped + row) * stride - strip.padding + taps,
            )
            pixel = strip.pixels[0] + (image * kept + row) * q
            place = divmod(pixel // q, p)
            assert place[0] == first + image
            wanted = range(place[1] * stride - padding, place[1] * stride - padding + taps)
            assert reads == wanted
            assert all(top <= r < top + rows for r in wanted if 0 <= r < h)
            seen.append(place)
    assert seen == list(product(range(n), range(p)))


@needs_onednn
@pytest.mark.parametrize("most", [0, 3000, 20_000, strips.STRIP_BYTES])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu", "hardswish", "gelu"])
@pytest.mark.parametrize("sides", [(1, 1, 1, 1), (0, 0, 0, 0), (0, 1, 1, 2), (3, 3, 2, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_values(monkeypatch, most, activation, sides, stride):
    torch.manual_seed(0)
    monkeypatch.setattr(strips, "STRIP_BYTES", most)
    geometry = Geometry((stride, stride), sides)
    x = torch.randn(3, 5, 11, 9)
    x[1, 2, 3, 4] = float("nan")
    conv = StripedSeparableConv2d(stride)
    for sets, biased, added in product((1, 2, 3), (False, True), (False, True)):
        dw, pw = torch.randn(5 * sets, 1, 3, 3), torch.randn(7, 5 * sets, 1, 1)
        biases = (torch.randn(5 * sets), torch.randn(7)) if biased else (None, None)
        residual = torch.randn(3, 7, *geometry.output_size((11, 9), (3, 3))) if added else None
        epilogue = Epilogue(activation, activation, residual)
        expected = separable_conv2d(x, Weights(dw, pw, *biases), geometry, epilogue)
        assert conv.takes(x, dw, pw, sides) or sets == 1
        for _ in range(2):
            got = conv(x, dw, pw, *biases, sides, *epilogue)
            assert got.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5, equal_nan=True)


@needs_onednn
def test_what_does_not_fit_is_left_to_the_op():
    conv, dw, pw = StripedSeparableConv2d(1), torch.ones(8, 1, 3, 3), torch.ones(2, 8, 1, 1)
    sides = (0, 0, 0, 0)
    assert conv.takes(torch.ones(1, 4, 3, 3), dw, pw, sides)
    assert not conv.takes(torch.ones(1, 3, 3, 3), dw, pw, sides)  # 8 filters for 3 channels
    assert not conv.takes(torch.ones(1, 8, 3, 3), dw, pw, sides)  # one for each, and small
    large = torch.zeros(1).expand(1, 8, 3000, 3000)
    assert conv.takes(large, dw, pw, sides)
    assert not conv.takes(torch.ones(1, 4, 2, 3), dw, pw, sides)  # no pixel
    assert not conv.takes(torch.ones(1, 4, 3, 3), dw, pw[:, :4], sides)
    with torch.inference_mode():
        assert not conv.takes(torch.ones(1, 4, 3, 3), torch.ones(8, 1, 3, 3), pw, sides)


@needs_onednn
def test_weights_are_prepared_once_and_after_every_change(monkeypatch):
    torch.manual_seed(0)
    x, dw, pw = torch.randn(1, 4, 6, 6), torch.randn(8, 1, 3, 3), torch.randn(3, 8, 1, 1)
    conv, sides = StripedSeparableConv2d(1), (1, 1, 1, 1)

    def check():
        expected = separable_conv2d(
            x, Weights(dw, pw, None, None), Geometry((1, 1), sides), Epilogue(None, None, None)
        )
        torch.testing.assert_close(conv(x, dw, pw, None, None, sides), expected)

    check()
    with monkeypatch.context() as patched:
        patched.setattr(strips, "pack_depthwise", lambda *_: pytest.fail("packed again"))
        with torch.inference_mode():
            check()
        x = torch.randn(2, 4, 9, 7)
        check()
    dw.mul_(2)
    check()
    pw.neg_()
    check()
    dw, pw = dw * 3, pw.flip(0)
    check()
    for copied in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert copied._prepared is None


@needs_onednn
def test_defaults_of_the_process_and_gradients_of_a_residual():
    torch.manual_seed(0)
    x, dw, pw = torch.randn(1, 4, 6, 6), torch.randn(8, 1, 3, 3), torch.randn(3, 8, 1, 1)
    conv, sides = StripedSeparableConv2d(1), (1, 1, 1, 1)
    expected = conv(x, dw, pw, None, None, sides)
    torch.set_default_dtype(torch.float64)
    try:
        got = conv(x, dw, pw, None, None, sides)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype is torch.float32
    assert torch.equal(got, expected)
    residual = torch.randn(1, 3, 6, 6, requires_grad=True)
    y = conv(x, dw, pw, None, torch.randn(3), sides, None, "relu", residual)
    y.sum().backward()
    assert torch.equal(residual.grad, (y > 0).float())
