"""Rules of padding, and the convolutions that follow them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sepconv.kernels.geometry import fixed_sides, padding_sides
from sepconv.nn import DepthwiseConv2d, PaddedConv2d, PointwiseConv2d

SIZES = [(1, 7), (7, 8), (224, 225), (5, 2)]


@pytest.mark.parametrize(
    ("rule", "size", "stride", "dilation"),
    [
        *[("same", size, stride, d) for size in SIZES for stride in (1, 2, 3) for d in (1, 2)],
        *[((1, 1), size, stride, 1) for size in SIZES for stride in (1, 2)],
        *[("keras", size, 1, d) for size in SIZES for d in (1, 2)],
        ("keras", (224, 6), 2, 1),  # odd sizes it rounds down
    ],
)
def test_output_has_size_over_stride_rounded_up(rule, size, stride, dilation):
    sides = padding_sides(rule, size, (3, 3), (stride, stride), (dilation, dilation))
    top, bottom, left, right = sides
    x = F.pad(torch.zeros(1, 1, *size), (left, right, top, bottom))
    y = F.conv2d(x, torch.zeros(1, 1, 3, 3), stride=stride, dilation=dilation)
    assert list(y.shape[2:]) == [-(-n // stride) for n in size]


def test_rules_sample_different_pixels():
    even, odd, settings = (8, 8), (9, 9), ((3, 3), (2, 2))
    assert padding_sides((1, 1), even, *settings) == (1, 1, 1, 1)
    assert padding_sides("same", even, *settings) == (0, 1, 0, 1)
    assert padding_sides("keras", even, *settings) == (0, 1, 0, 1)
    assert padding_sides("same", odd, *settings) == (1, 1, 1, 1)
    assert padding_sides("keras", odd, *settings) == (0, 1, 0, 1)


@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 3), (2, 5), (4, 3)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_same_at_stride_1_is_torchs(kernel_size, dilation):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 2, 9, 10), torch.randn(3, 2, *kernel_size)
    top, bottom, left, right = padding_sides("same", (9, 10), kernel_size, (1, 1), dilation)
    padded = F.pad(x, (left, right, top, bottom))
    want = F.conv2d(x, weight, padding="same", dilation=dilation)
    assert torch.allclose(F.conv2d(padded, weight, dilation=dilation), want, atol=1e-5)


@pytest.mark.parametrize("padding", [(2, 1), "valid", "same", "keras"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 2)])
def test_sides_that_are_fixed_are_those_of_every_size(padding, stride):
    fixed = fixed_sides(padding, (3, 5), stride, (1, 1))
    found = {
        padding_sides(padding, (h, w), (3, 5), stride) for h in range(5, 9) for w in range(5, 9)
    }
    assert found == {fixed} if not isinstance(fixed, str) else len(found) > 1


GEOMETRIES = [
    {"stride": 2, "padding": "same"},
    {"stride": 2, "padding": "keras"},
    {"stride": (1, 2), "padding": "same", "dilation": (2, 1)},
    {"padding": 1},
    {"padding": (0, 2), "bias": False},
    {"padding": "valid"},
]


def by_hand(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    geometry = (conv.padding, x.shape[2:], conv.kernel_size, conv.stride, conv.dilation)
    top, bottom, left, right = padding_sides(*geometry)
    x = F.pad(x, (left, right, top, bottom))
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda **options: PaddedConv2d(4, 6, 3, **options),
        lambda **options: PaddedConv2d(4, 6, 3, groups=2, **options),
        lambda **options: DepthwiseConv2d(4, 3, **options),
        lambda **options: DepthwiseConv2d(4, 3, channel_multiplier=2, **options),
    ],
)
def test_modules_convolve_with_their_padding(make, options):
    torch.manual_seed(0)
    conv = make(**options, dtype=torch.float64)
    for size in ((9, 10), (8, 7)):
        x = torch.randn(2, 4, *size, dtype=torch.float64)
        want = by_hand(conv, x)
        for same in (conv, copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
            assert torch.allclose(same(x), want, atol=1e-12)
            assert torch.allclose(same(x[1]), want[1], atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_pointwise(bias):
    conv = PointwiseConv2d(4, 6, bias, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    assert torch.allclose(conv(x), by_hand(conv, x), atol=1e-12)


def test_they_are_convolutions_to_whoever_looks():
    conv = DepthwiseConv2d(4, (3, 5), 2, "same", channel_multiplier=3)
    plain = nn.Conv2d(4, 12, (3, 5), 2, groups=4)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"):
        assert getattr(conv, name) == getattr(plain, name), name
    plain.load_state_dict(conv.state_dict())
    assert "padding=same" in repr(conv)


@pytest.mark.parametrize("padding", ["full", -1, (1, 2, 3)])
def test_paddings_that_are_none_are_refused(padding):
    with pytest.raises(ValueError, match="padding: expected"):
        PaddedConv2d(4, 6, 3, padding=padding)
