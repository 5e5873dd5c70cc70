"""The CPU path against torch's own convolutions: values, layouts, sizes of zero."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from ops.calls import ACTIVATIONS, OPS, arguments, expected, public, tensors_of
from torch.autograd import gradcheck, gradgradcheck

from sepconv import ops
from sepconv.ops import reference
from sepconv.ops.layout import is_channels_last

CL, NCHW = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_are_those_of_torch(op, activation, channels_last):
    call = arguments(op, channels_last=channels_last, activation=activation)
    torch.testing.assert_close(public(op, call), expected(op, call), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_in_lower_precision(op, dtype):
    call = arguments(op, dtype=dtype, activation="silu")
    y, truth = public(op, call), expected(op, {k: _double(v) for k, v in call.items()})
    # one rounding for each stored intermediate: depthwise, pointwise, sum with residual, result
    assert y.dtype == dtype
    magnitude = truth.abs().max()
    assert (y.double() - truth).abs().max() <= 8 * torch.finfo(dtype).eps * magnitude


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    "padding",
    [0, 2, (1, 0), [0, 3], ((0, 1), (2, 0)), (1, (0, 2)), "valid", "same"],
    ids=str,
)
def test_every_form_of_padding(padding):
    x, weight = torch.randn(1, 3, 7, 6).double(), torch.randn(3, 1, 4, 3).double()
    y = ops.depthwise_conv2d(x, weight, padding=padding)
    if isinstance(padding, str):
        wanted = F.conv2d(x, weight, padding=padding, groups=3)
    else:
        vertical, horizontal = (padding, padding) if isinstance(padding, int) else padding
        top, bottom = (vertical, vertical) if isinstance(vertical, int) else vertical
        left, right = (horizontal, horizontal) if isinstance(horizontal, int) else horizontal
        wanted = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, groups=3)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("multiplier", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_channel_multiplier(multiplier, dtype):
    x = torch.randint(-2, 3, (2, 3, 6, 5)).to(dtype)
    weight_dw = torch.randint(-1, 2, (3 * multiplier, 1, 3, 3)).to(dtype)
    weight_pw = torch.randint(-1, 2, (4, 3 * multiplier, 1, 1)).to(dtype)
    y = ops.separable_conv2d(x, weight_dw, weight_pw, padding=1, activation_mid="relu")
    middle = F.relu(F.conv2d(x, weight_dw, padding=1, groups=3))
    assert torch.equal(y, F.conv2d(middle, weight_pw))  # integers: exact in any order


def _layouts():
    """Tensors of every kind of stride that decides a convolution's memory format."""
    for n, c, h, w in [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1)]:
        base = torch.randn(n, c, h, w)
        last = torch.empty(n, c, h, w, memory_format=CL).copy_(base)
        wide = torch.randn(n, 2 * c, h, w + 1)
        yield f"nchw {n}{c}{h}{w}", base
        yield f"nhwc {n}{c}{h}{w}", last
        yield f"channels of more {n}{c}{h}{w}", wide[:, ::2, :, :w]
        yield f"nhwc slice {n}{c}{h}{w}", wide.to(memory_format=CL)[:, :c, :, :w]
        yield f"expanded {n}{c}{h}{w}", base[:1].expand(n, c, h, w)
        yield f"transposed {n}{c}{h}{w}", torch.randn(n, c, w, h).transpose(2, 3)


@pytest.mark.parametrize(("name", "x"), [pytest.param(*p, id=p[0]) for p in _layouts()])
@pytest.mark.parametrize("weights_last", [False, True])
def test_strides_are_those_of_torch(name, x, weights_last):
    c = x.shape[1]
    fmt = CL if weights_last else NCHW
    weight_dw = torch.empty(2 * c, 1, 3, 3, memory_format=fmt).normal_()
    weight_pw = torch.empty(4, 2 * c, 1, 1, memory_format=fmt).normal_()
    mixing = torch.empty(4, c, 1, 1, memory_format=fmt).normal_()

    depthwise = F.conv2d(x, weight_dw, padding=1, groups=c)
    assert ops.depthwise_conv2d(x, weight_dw, padding=1).stride() == depthwise.stride()
    assert ops.pointwise_conv2d(x, mixing).stride() == F.conv2d(x, mixing).stride()
    separable = F.conv2d(depthwise, weight_pw)
    assert ops.separable_conv2d(x, weight_dw, weight_pw, padding=1).stride() == separable.stride()


def test_layout_rule_is_that_of_aten():
    """`is_channels_last` against what ATen's own convolution makes of the same strides."""
    storage = torch.randn(200)
    judged = [0, 0]
    for shape in itertools.product((2,), (1, 3), (1, 2), (3,)):
        weight = torch.randn(2, shape[1], 1, 1)
        for strides in itertools.product((1, 3, 6, 12), repeat=4):
            x = storage.as_strided(shape, strides)
            answer = F.conv2d(x, weight).stride(1) == 1
            assert is_channels_last(x) == answer, (shape, strides)
            judged[answer] += 1
    assert min(judged) > 10, "both answers occurred"


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize(
    ("shape", "filters", "padding"),
    [
        ((0, 3, 5, 5), 4, 1),  # no images
        ((2, 0, 5, 5), 4, 1),  # no channels
        ((2, 3, 0, 5), 4, 2),  # no rows but padding
        ((2, 3, 5, 5), 0, 1),  # no output channels
    ],
)
def test_sizes_of_zero(shape, filters, padding, multiplier):
    c = shape[1]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight_dw = torch.randn(multiplier * c, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    weight_pw = torch.randn(filters, multiplier * c, 1, 1, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(filters, dtype=torch.float64, requires_grad=True)
    y = ops.separable_conv2d(x, weight_dw, weight_pw, bias_pw=bias, padding=padding)

    p, q = shape[2] + 2 * padding - 2, shape[3] + 2 * padding - 2
    assert y.shape == (shape[0], filters, p, q)
    if 0 in shape and y.numel():  # nothing to sum up, so the bias alone
        assert torch.equal(y, bias.view(-1, 1, 1).expand_as(y))
    grads = torch.autograd.grad(y.sum(), (x, weight_dw, weight_pw, bias))
    assert [g.shape for g in grads] == [t.shape for t in (x, weight_dw, weight_pw, bias)]
    assert torch.equal(grads[3], torch.full((filters,), float(shape[0] * p * q)).double())
    assert ops.depthwise_conv2d(x, weight_dw, padding=padding).shape == (
        *(shape[0], multiplier * c, p, q),
    )


@pytest.mark.parametrize("activation", ["relu6", "silu"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_the_reference(op, activation):
    call = arguments(op, requires_grad=True, activation=activation)
    tensors = tensors_of(call)

    def run(*values):
        return public(op, {**call, **dict(zip(tensors, values, strict=True))})

    assert gradcheck(run, tuple(tensors.values()), fast_mode=True)
    assert gradgradcheck(run, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_backward_is_the_derivative(activation):
    z = torch.linspace(-8, 8, 33, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(z)
    y = reference.activate(z, activation)
    (wanted,) = torch.autograd.grad(y, z, dy)
    for input_or_output in (z, y) if activation in ("relu", "relu6") else (z,):
        dz = reference.activation_backward(dy, input_or_output.detach(), activation)
        torch.testing.assert_close(dz, wanted)
