"""Random small networks: exact at full rank, and an honest error below it."""

import warnings

import pytest
import torch
from conversion.compare import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sepconv
from sepconv.nn import SeparableConv2d

pytestmark = [
    # Torch's own remark on even filters with padding="same".
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    # Networks as small as these do not get faster.
    pytest.mark.filterwarnings("ignore:convert. the model did not get faster"),
]


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Sequential, Tensor]:
    """One to three convolutions of any legal geometry, with an input that they accept."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    channels = draw(st.integers(1, 7))
    layers: list[nn.Module] = []
    size = (draw(st.integers(9, 14)), draw(st.integers(9, 14)))
    x = torch.randn(draw(st.integers(1, 3)), channels, *size, dtype=torch.float64)
    y = x
    for _ in range(draw(st.integers(1, 3))):
        kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
        dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
        stride: int | tuple[int, int] = draw(
            st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 2)))
        )
        padding = draw(
            st.one_of(
                st.sampled_from(["valid", "same"] if stride in (1, (1, 1)) else ["valid"]),
                st.integers(0, 3),
                st.tuples(st.integers(0, 3), st.integers(0, 3)),
            )
        )
        out = draw(st.integers(1, 9))
        conv = nn.Conv2d(
            channels,
            out,
            kernel,
            stride,
            padding,
            dilation,
            bias=draw(st.booleans()),
            dtype=torch.float64,
        )
        pads = (0, 0)
        if not isinstance(padding, str):
            pads = (padding, padding) if isinstance(padding, int) else padding
        room = [y.shape[2 + i] + 2 * pads[i] - dilation[i] * (kernel[i] - 1) for i in (0, 1)]
        if min(room) < 1:
            break
        y = conv(y)
        channels = out
        layers += [conv, draw(st.sampled_from([nn.ReLU(), nn.BatchNorm2d(out), nn.Identity()]))]
    return nn.Sequential(*layers).double(), x


@settings(max_examples=60, deadline=None, derandomize=True)
@given(networks(), st.booleans(), st.booleans())
def test_full_rank_is_exact(
    case: tuple[nn.Sequential, Tensor], training: bool, example: bool
) -> None:
    model, x = case
    model.train(training and x.shape[0] * min(x.shape[2:]) > 1)
    with torch.no_grad():
        converted = quietly(model, x if example else None, rank="full")
        for module in (model, converted):
            module.eval()
        expected = model(x)
        assert relative_error(converted(x) + 1, expected + 1) <= 1e-10
    for old, new in zip(model, converted, strict=True):
        eligible = isinstance(old, nn.Conv2d) and old.kernel_size != (1, 1)
        assert isinstance(new, SeparableConv2d) == eligible


@settings(max_examples=60, deadline=None, derandomize=True)
@given(networks(), st.integers(1, 16))
def test_reported_errors_are_the_weights_errors(
    case: tuple[nn.Sequential, Tensor], rank: int
) -> None:
    model, _ = case
    converted = quietly(model, None, rank=rank)
    for layer in sepconv.report(converted).converted:
        old, new = model.get_submodule(layer.name), converted.get_submodule(layer.name)
        full = min(old.out_channels, old.weight[0, 0].numel())
        assert layer.rank == new.channel_multiplier == min(rank, full)
        error = ((old.weight - new.weight).norm() / old.weight.norm()).item()
        assert abs(layer.error - error) <= 1e-7  # a square root of float64 rounding
        assert (layer.error == 0) == (rank >= full)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(networks(), st.integers(1, 4), st.booleans())
def test_costs_are_those_of_the_result(
    case: tuple[nn.Sequential, Tensor], rank: int, inplace: bool
) -> None:
    model, x = case
    before = sum(p.numel() for p in model.parameters())
    converted = quietly(model, x, rank=rank, inplace=inplace)
    report = sepconv.report(converted)
    assert report.params_before == before
    assert report.params_after == sum(p.numel() for p in converted.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        converted.eval()(x)
    assert report.macs_after == counter.get_total_flops() // 2


def quietly(model: nn.Module, x: Tensor | None, **options: object) -> nn.Module:
    """Convert, without the warning for the networks of 1 x 1 filters that are drawn too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "convert: nothing was converted")
        return sepconv.convert(model, x, first_conv=True, **options)
