"""The module that stands where a convolution stood."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepconv.nn import SeparableConv1d, SeparableConv2d

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 5), "padding": (1, 2), "stride": (2, 1), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 2, "padding": "valid", "stride": 3},
    {"kernel_size": 1},
]


def by_two_convolutions(module: SeparableConv2d, x: Tensor) -> Tensor:
    """The definition, in torch's own words."""
    depthwise = F.conv2d(
        x,
        module.weight_dw,
        None,
        module.stride,
        module.padding,
        module.dilation,
        module.in_channels,
    )
    return F.conv2d(depthwise, module.weight_pw, module.bias)


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("channel_multiplier", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_a_depthwise_and_a_pointwise_convolution(
    options: dict[str, Any], channel_multiplier: int, bias: bool
) -> None:
    torch.manual_seed(0)
    module = SeparableConv2d(
        4, 6, **options, channel_multiplier=channel_multiplier, bias=bias, dtype=torch.float64
    )
    x = torch.randn(2, 4, 11, 12, dtype=torch.float64)
    assert torch.allclose(module(x), by_two_convolutions(module, x), atol=1e-12)
    assert torch.allclose(module(x[0]), by_two_convolutions(module, x)[0], atol=1e-12)


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("channel_multiplier", [1, 2])
def test_its_weight_is_the_dense_weight_of_the_factors(
    options: dict[str, Any], channel_multiplier: int
) -> None:
    torch.manual_seed(0)
    module = SeparableConv2d(
        4, 6, **options, channel_multiplier=channel_multiplier, dtype=torch.float64
    )
    dense = nn.Conv2d(4, 6, **options, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(module.weight)
        dense.bias.copy_(module.bias)
    x = torch.randn(2, 4, 11, 12, dtype=torch.float64)
    assert torch.allclose(module(x), dense(x), atol=1e-12)


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_it_reads_like_the_convolution_of_the_same_arguments(options: dict[str, Any]) -> None:
    module, dense = SeparableConv2d(4, 6, **options), nn.Conv2d(4, 6, **options)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "transposed",
        "output_padding",
    ):
        assert getattr(module, name) == getattr(dense, name), name
    assert module.weight.shape == dense.weight.shape
    assert module.bias.shape == dense.bias.shape


def test_its_children_and_state() -> None:
    module = SeparableConv2d(4, 6, 3, channel_multiplier=2)
    assert list(module.children()) == []
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
        "weight_dw": (8, 1, 3, 3),
        "weight_pw": (6, 8, 1, 1),
        "bias": (6,),
    }
    assert SeparableConv2d(4, 6, 3, bias=False).bias is None
    for way in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        x = torch.randn(1, 4, 5, 5)
        assert torch.equal(way(module)(x), module(x))


def test_every_parameter_and_the_input_get_gradients() -> None:
    torch.manual_seed(0)
    module = SeparableConv2d(3, 4, 3, padding=1, channel_multiplier=2, dtype=torch.float64)
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, dw: Tensor, pw: Tensor, bias: Tensor) -> Tensor:
        state = {"weight_dw": dw, "weight_pw": pw, "bias": bias}
        return torch.func.functional_call(module, state, (x,))

    assert torch.autograd.gradcheck(run, (x, module.weight_dw, module.weight_pw, module.bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_follow_the_parameters(dtype: torch.dtype) -> None:
    module = SeparableConv2d(4, 6, 3, dtype=dtype)
    y = module(torch.randn(1, 4, 6, 6, dtype=dtype))
    assert y.dtype == dtype
    assert {p.dtype for p in module.double().parameters()} == {torch.float64}


def test_layout_of_the_output_follows_the_weights_and_the_input() -> None:
    x = torch.randn(2, 4, 6, 6)
    nhwc, nchw = SeparableConv2d(4, 6, 3), SeparableConv2d(4, 6, 3, channels_last=False)
    assert nhwc.keeps_channels_last
    assert not nchw.keeps_channels_last
    last = torch.channels_last
    assert nhwc(x).is_contiguous(memory_format=last)
    assert nchw(x).is_contiguous()
    assert nchw(x.contiguous(memory_format=last)).is_contiguous(memory_format=last)
    assert nchw.to(memory_format=last)(x).is_contiguous(memory_format=last)


def test_random_weights_keep_the_scale_of_a_convolution() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64, 12, 12)
    dense, module = nn.Conv2d(64, 64, 3), SeparableConv2d(64, 64, 3)
    assert 0.1 < float(module(x).std() / dense(x).std()) < 10
    before = module.weight_dw.detach().clone()
    module.reset_parameters()
    assert not torch.equal(module.weight_dw, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels.*0"),
        ({"out_channels": -1}, "out_channels.*-1"),
        ({"channel_multiplier": 0}, "channel_multiplier.*0"),
        ({"channel_multiplier": 1.5}, "channel_multiplier.*1.5"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size"),
        ({"stride": (1, 2, 3)}, "stride"),
        ({"dilation": "2"}, "dilation"),
        ({"kernel_size": 0}, "kernel_size.*0"),
        ({"stride": 0}, "stride.*0"),
        ({"dilation": (1, 0)}, "dilation.*0"),
        ({"padding": -1}, "padding.*-1"),
        ({"padding": "full"}, "padding.*'full'"),
        ({"padding": "same", "stride": 2}, "padding.*same.*stride 1.*2"),
    ],
    ids=str,
)
def test_arguments_that_make_no_convolution_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    given = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **arguments}
    with pytest.raises(ValueError, match=message):
        SeparableConv2d(**given)


def test_an_input_of_other_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="x"):
        SeparableConv2d(4, 6, 3)(torch.zeros(1, 5, 6, 6))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 5, "padding": 2, "stride": 2, "dilation": 2},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": (3,), "stride": (2,), "padding": (1,)},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_sequences(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = SeparableConv1d(4, 6, **options, channel_multiplier=2, dtype=torch.float64)
    dense = nn.Conv1d(4, 6, **options, dtype=torch.float64)
    assert (module.kernel_size, module.stride, module.padding, module.dilation) == (
        dense.kernel_size,
        dense.stride,
        dense.padding,
        dense.dilation,
    )
    with torch.no_grad():
        dense.weight.copy_(module.weight)
        dense.bias.copy_(module.bias)
    x = torch.randn(2, 4, 17, dtype=torch.float64)
    assert torch.allclose(module(x), dense(x), atol=1e-12)
    assert torch.allclose(module(x[0]), dense(x[0]), atol=1e-12)


def test_it_shows_its_arguments() -> None:
    text = repr(SeparableConv2d(4, 6, 3, padding="same", channel_multiplier=2, bias=False))
    for part in ("4, 6", "kernel_size=(3, 3)", "'same'", "channel_multiplier=2", "bias=False"):
        assert part in text


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kind", [SeparableConv2d, SeparableConv1d])
@pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:.*torch.jit:DeprecationWarning")
def test_scripted_it_gives_the_same(kind: type[SeparableConv2d], options: dict[str, Any]) -> None:
    """And without this package: the program holds operators of torch's alone."""
    if kind is SeparableConv1d:
        options = {k: v if not isinstance(v, tuple) else v[:1] for k, v in options.items()}
    module = kind(4, 6, **options, channel_multiplier=2, dtype=torch.float64)
    scripted = torch.jit.script(nn.Sequential(module))
    x = torch.randn((2, 4, 11, 12)[: module.weight.dim()], dtype=torch.float64)
    assert torch.allclose(scripted(x), module(x), atol=1e-12)
    assert torch.allclose(scripted(x[0]), module(x[0]), atol=1e-12)
    assert not any(name.startswith("sepconv") for name in torch.jit.export_opnames(scripted))
