"""The convolution of an image's few channels, against torch's own operators."""

import itertools

import pytest
import torch

from sepconv.kernels.geometry import Geometry
from sepconv.nn.fused import FusedConv2d
from sepconv.ops import backend
from sepconv.ops.stem import by_library, stem_conv2d, stem_takes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEOMETRIES = (
    Geometry((2, 2), (1, 1, 1, 1)),
    Geometry((2, 2), (0, 1, 0, 1)),
    Geometry((1, 3), (2, 0, 1, 4), (2, 1)),
)


def operands(dtype: torch.dtype, c: int, k: int, taps: tuple[int, int], last: bool):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (2, c, 11, 13), generator=generator)
    weight = torch.randint(-2, 3, (k, c, *taps), generator=generator)
    bias = torch.randint(-2, 3, (k,), generator=generator)
    layout = torch.channels_last if last else torch.contiguous_format
    x, weight = (t.to(DEVICE, dtype).contiguous(memory_format=layout) for t in (x, weight))
    return x, weight, bias.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_it_is_exact_on_integers(dtype: torch.dtype, geometry: Geometry):
    for (c, k, taps), last in itertools.product(
        [(3, 8, (3, 3)), (1, 70, (2, 5)), (4, 16, (5, 4))], [True, False]
    ):
        x, weight, bias = operands(dtype, c, k, taps, last)
        with backend("triton"):
            y = stem_conv2d(x, weight, bias, geometry, "relu")
        expected = by_library(x.double(), weight.double(), bias.double(), geometry, "relu")
        assert torch.equal(y.double(), expected)
        assert y.is_contiguous(memory_format=torch.channels_last) or not last or c == 1


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_gradients(activation: str | None):
    x, weight, bias = (t.requires_grad_() for t in operands(torch.float64, 3, 4, (3, 3), True))
    with backend("triton"):
        for geometry in GEOMETRIES:
            y = stem_conv2d(x, weight, bias, geometry, activation)
            expected = by_library(x, weight, bias, geometry, activation)
            dy = torch.randn_like(y)
            torch.testing.assert_close(
                torch.autograd.grad(y, (x, weight, bias), dy),
                torch.autograd.grad(expected, (x, weight, bias), dy),
            )


def test_the_operator_keeps_torch_s_rules():
    x, weight, bias = operands(torch.float32, 3, 4, (3, 3), True)
    arguments = (x, weight.requires_grad_(), bias, (2, 2), (1, 1, 1, 1), (1, 1), "relu")
    with backend("triton"):
        torch.library.opcheck(torch.ops.sepconv.stem_conv2d, arguments)


def test_a_fused_convolution_uses_it_where_kernels_run():
    x, weight, bias = operands(torch.float16, 3, 4, (3, 3), True)
    # In another layout than the one that a CPU's library packs.
    fused = FusedConv2d(weight, bias, (2, 2), (0, 1, 0, 1), activation="relu", channels_last=False)
    expected = by_library(x, weight, bias, GEOMETRIES[1], "relu")
    with torch.no_grad(), backend("triton"), torch.profiler.profile() as profile:
        torch.testing.assert_close(fused(x), expected)
    assert "sepconv::stem_conv2d" in {event.key for event in profile.key_averages()}


def test_other_convolutions_are_left_to_the_library():
    x, weight, _ = operands(torch.bfloat16, 3, 4, (3, 3), True)
    assert not stem_takes(x, weight) or DEVICE == "cuda"
    with backend("triton"):
        assert stem_takes(x, weight)
        assert stem_takes(x, weight.repeat(16, 1, 1, 1))
        assert not stem_takes(x, weight.repeat(17, 1, 1, 1)), "two tiles of filters"
        assert not stem_takes(x, weight.repeat(1, 1, 6, 6)), "patches of a vision transformer"
        assert not stem_takes(x, weight.double())
        assert not stem_takes(x.float(), weight.float()), "not measured"
        assert not stem_takes(x.repeat(1, 3, 1, 1), weight.repeat(1, 3, 1, 1))


def test_wrong_arguments_are_named():
    x, weight, bias = operands(torch.float32, 3, 4, (3, 3), True)
    geometry = GEOMETRIES[0]
    wrong = {
        "weight: expected shape": (x[:, :2], weight, bias, geometry, None),
        "x: expected height and width": (x[:, :, :2, :2], weight, bias, Geometry(), None),
        "weight: expected x's dtype": (x, weight.double(), bias, geometry, None),
        "bias: expected shape": (x, weight, bias[:2], geometry, None),
        "activation: expected None": (x, weight, bias, geometry, "tanh"),
        "x: expected dtype": (x.long(), weight, bias, geometry, None),
    }
    with backend("triton"):
        for message, arguments in wrong.items():
            with pytest.raises(ValueError, match=message):
                stem_conv2d(*arguments)
