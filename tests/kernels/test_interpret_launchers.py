"""Every launcher and kernel variant against float64; the fuzz in tests/fuzz covers the rest."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sepconv.kernels import launch
from sepconv.kernels.configs import DepthwiseConfig, GemmConfig
from sepconv.kernels.depthwise import depthwise_fwd
from sepconv.kernels.depthwise_bwd_input import depthwise_bwd_input
from sepconv.kernels.depthwise_bwd_weight import depthwise_bwd_weight
from sepconv.kernels.geometry import Geometry
from sepconv.kernels.launch import MAX_AXIS, collapse, dot_options
from sepconv.kernels.pointwise import pointwise_fwd
from sepconv.kernels.separable import separable_fwd
from sepconv.ops.layout import side_by_side

PACKING = pytest.mark.parametrize("worth_packing", [0, 1 << 60], ids=["packed", "unpacked"])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


SAME = Geometry(padding=(1, 1, 1, 1))


class Case(NamedTuple):
    filter_size: tuple[int, int] = (3, 3)
    geometry: Geometry = SAME
    M: int = 1


CASES = [
    Case(),
    Case((3, 3), Geometry((2, 2), (0, 1, 0, 1))),
    Case((5, 2), Geometry((1, 3), (4, 0, 2, 1), (1, 2)), M=3),
    Case((3, 3), Geometry((4, 6), (2, 2, 3, 3), (2, 4)), M=2),
    Case((2, 11), Geometry((3, 2), (0, 0, 6, 5))),
    Case((7, 1), Geometry((1, 1), (3, 3, 0, 0)), M=2),
    Case((1, 1), Geometry((2, 1))),
]
CONFIGS = [
    DepthwiseConfig(16, 16),
    DepthwiseConfig(16, 16, 4),
    DepthwiseConfig(8, 16, 4, columns=2),
]
N, C, H, W, K = 2, 11, 5, 7, 13


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers, half of them zero: every sum is exact, so results must be equal."""
    values = torch.randint(-2, 3, shape) * torch.randint(0, 2, shape)
    return values.to(dtype).to(DEVICE)


def conv_dw(x: Tensor, weight_dw: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, (top, bottom, left, right), dilation = geometry
    padded = F.pad(x.double(), (left, right, top, bottom))
    bias = None if bias is None else bias.double()
    return F.conv2d(padded, weight_dw.double(), bias, stride, 0, dilation, x.shape[1])


def weights(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    G = C * case.M
    return integers(G, 1, *case.filter_size, dtype=dtype), integers(K, G, 1, 1, dtype=dtype)


def assert_exact(actual: Tensor, expected: Tensor, channels_last: bool | None = None) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=0, equal_nan=True)
    if channels_last is not None:
        last, first = torch.channels_last, torch.contiguous_format
        assert actual.is_contiguous(memory_format=last if channels_last else first)


@PACKING
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", CONFIGS)
def test_depthwise_fwd(case: Case, config: DepthwiseConfig, worth_packing, monkeypatch):
    monkeypatch.setattr(launch, "_WORTH_PACKING", worth_packing)
    torch.manual_seed(0)
    x, (weight_dw, _) = integers(N, C, H, W), weights(case)
    x = x.contiguous(memory_format=torch.channels_last)
    bias = integers(C * case.M)
    y = depthwise_fwd(x, weight_dw, bias, case.geometry, "relu", channels_last=True, config=config)
    assert_exact(y, conv_dw(x, weight_dw, bias, case.geometry).relu(), channels_last=True)


@PACKING
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", CONFIGS)
def test_depthwise_bwd(case: Case, config: DepthwiseConfig, worth_packing, monkeypatch):
    monkeypatch.setattr(launch, "_WORTH_PACKING", worth_packing)
    torch.manual_seed(0)
    x = integers(N, C, H, W).requires_grad_()
    weight_dw = weights(case)[0].requires_grad_()
    z = conv_dw(x, weight_dw, None, case.geometry)
    # Strided, and every other element of something larger.
    dy = integers(z.shape[2], z.shape[0], z.shape[3], 2 * z.shape[1]).permute(1, 3, 0, 2)[:, ::2]
    expected_dx, expected_dw = torch.autograd.grad(z, (x, weight_dw), dy.double())

    x, weight_dw = x.detach(), weight_dw.detach()
    dx = depthwise_bwd_input(
        dy, weight_dw, tuple(x.shape), case.geometry, channels_last=True, config=config
    )
    assert_exact(dx, expected_dx, channels_last=True)
    dw = depthwise_bwd_weight(dy, x, tuple(weight_dw.shape), case.geometry, config=config)
    assert_exact(dw, expected_dw)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("tile", [(16, 16, 16), (32, 16, 32)])
def test_pointwise_fwd(tile: tuple[int, int, int], channels_last: bool):
    torch.manual_seed(0)
    x = integers(N, H, C, 2 * W).permute(0, 2, 1, 3)[..., ::2]
    weight_pw, bias, residual = integers(K, C, 1, 1), integers(K), integers(N, K, H, 1)
    residual = residual.expand(N, K, H, W)
    y = pointwise_fwd(
        x,
        weight_pw,
        bias,
        "relu6",
        residual,
        allow_tf32=False,
        channels_last=channels_last,
        config=GemmConfig(*tile),
    )
    expected = F.conv2d(x.double(), weight_pw.double(), bias.double()) + residual
    assert_exact(y, F.relu6(expected), channels_last)


@PACKING
@pytest.mark.parametrize("case", [*CASES[:4], CASES[5]])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_separable_fwd(case: Case, rows: int, worth_packing: int, monkeypatch):
    monkeypatch.setattr(launch, "_WORTH_PACKING", worth_packing)
    torch.manual_seed(0)
    x, (weight_dw, weight_pw) = integers(N, C, H, W), weights(case)
    bias_dw, bias_pw = integers(C * case.M), integers(K)
    mid = conv_dw(x, weight_dw, bias_dw, case.geometry).relu()
    residual = integers(N, K, *mid.shape[2:])
    y = separable_fwd(
        x,
        weight_dw,
        weight_pw,
        bias_dw,
        bias_pw,
        case.geometry,
        "relu",
        "relu",
        residual,
        allow_tf32=False,
        channels_last=True,
        config=GemmConfig(16, 16, 16, rows),
    )
    expected = F.conv2d(mid, weight_pw.double(), bias_pw.double()) + residual
    assert_exact(y, expected.relu(), channels_last=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_defaults_in_every_type(dtype: torch.dtype):
    torch.manual_seed(0)
    case = Case()
    x, (weight_dw, weight_pw) = integers(1, C, 4, 5, dtype=dtype), weights(case, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    mid = conv_dw(x, weight_dw, None, case.geometry)
    arguments = (case.geometry, None, None, None)
    y = separable_fwd(
        x, weight_dw, weight_pw, None, None, *arguments, allow_tf32=False, channels_last=True
    )
    expected = F.conv2d(mid, weight_pw.double())
    assert y.dtype == dtype
    # Sums up to a few hundred: bfloat16 has eight bits, and the interpreter truncates to it.
    tolerance = 2.0**-7 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=0)
    dw = depthwise_bwd_weight(x, x, tuple(weight_dw.shape), case.geometry)
    assert dw.dtype == dtype


SPECIAL = [float("nan"), float("inf"), float("-inf"), -1e30, -3.0, -0.5, 0.0, 0.5, 3.0, 6.0, 7.0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_special_values(activation: str):
    z = torch.tensor(SPECIAL, dtype=torch.float64, device=DEVICE)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64, device=DEVICE)
    got = pointwise_fwd(
        z.view(1, 1, 1, -1), one, None, activation, None, allow_tf32=False, channels_last=True
    )
    close = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}
    # On a GPU torch's own hardswish has one sixth in float32.
    torch.testing.assert_close(got.flatten().cpu(), ACTIVATIONS[activation](z.cpu()), **close)


@pytest.mark.parametrize(
    "config", [DepthwiseConfig(8, 8), DepthwiseConfig(8, 8, 2), DepthwiseConfig(4, 8, 2, columns=2)]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_padding_is_multiplied_forward_and_left_out_backward(config: DepthwiseConfig, value: float):
    x = torch.ones(1, 3, 4, 4, device=DEVICE, dtype=torch.float64, requires_grad=True)
    weight_dw = torch.ones(3, 1, 3, 3, device=DEVICE, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        weight_dw[1, 0, 0, 2] = value
    # On the CPU, ATen's float64 convolution is the plain one: columns times weights.
    y = F.conv2d(x.cpu(), weight_dw.cpu(), padding=1, groups=3)
    dy = torch.ones_like(y)
    dx, dw = torch.autograd.grad(y, (x, weight_dw), dy)
    x, weight_dw, dy = x.detach(), weight_dw.detach(), dy.to(DEVICE)
    got = depthwise_fwd(x, weight_dw, None, SAME, None, channels_last=True, config=config)
    assert_exact(got.cpu(), y.detach())
    got = depthwise_bwd_input(
        dy, weight_dw, tuple(x.shape), SAME, channels_last=True, config=config
    )
    assert_exact(got.cpu(), dx.cpu())
    got = depthwise_bwd_weight(dy, x, tuple(weight_dw.shape), SAME, config=config)
    assert_exact(got.cpu(), dw.cpu())


def test_nothing_is_launched_for_empty_tensors():
    x = torch.empty(0, 3, 4, 5, device=DEVICE)
    weight_dw, weight_pw = integers(3, 1, 3, 3), integers(2, 3, 1, 1)
    last = {"channels_last": True}
    assert depthwise_fwd(x, weight_dw, None, SAME, None, **last).shape == (0, 3, 4, 5)
    assert depthwise_bwd_input(x, weight_dw, x.shape, SAME, **last).shape == x.shape
    assert_exact(depthwise_bwd_weight(x, x, (3, 1, 3, 3), SAME), torch.zeros(3, 1, 3, 3))
    y = pointwise_fwd(x, weight_pw, None, None, None, allow_tf32=False, **last)
    assert y.shape == (0, 2, 4, 5)


def test_no_input_channels_leave_the_bias():
    bias = integers(2)
    y = pointwise_fwd(
        torch.empty(1, 0, 2, 2, device=DEVICE),
        torch.empty(2, 0, 1, 1, device=DEVICE),
        bias,
        None,
        None,
        allow_tf32=False,
        channels_last=True,
    )
    assert_exact(y, bias.view(1, 2, 1, 1).expand(1, 2, 2, 2))


def test_too_long_an_axis_is_refused():
    x = torch.empty(1, 1, 1, MAX_AXIS + 1, dtype=torch.float16, device="meta")
    weight_dw = torch.empty(1, 1, 1, 1, dtype=torch.float16, device="meta")
    with pytest.raises(NotImplementedError, match="axis longer than"):
        depthwise_fwd(x, weight_dw, None, Geometry(), None, channels_last=True)


def test_tensors_on_two_devices_are_refused():
    bias = torch.empty(3, device="meta")
    with pytest.raises(ValueError, match=r"expected every tensor on .*, got one on meta"):
        pointwise_fwd(
            integers(1, 3, 2, 2),
            integers(3, 3, 1, 1),
            bias,
            None,
            None,
            allow_tf32=False,
            channels_last=True,
        )


@pytest.mark.parametrize(
    ("tensors", "sizes"),
    [
        ((torch.empty(2, 3, 4),), [1, 1, 24]),
        ((torch.empty(2, 3, 4), torch.empty(1, 1, 1).expand(2, 3, 4)), [1, 1, 24]),
        ((torch.empty(2, 3, 4), torch.empty(2, 3, 8)[..., ::2]), [1, 1, 24]),
        ((torch.empty(2, 3, 4), torch.empty(2, 3, 5)[..., :4]), [1, 6, 4]),
        ((torch.empty(2, 3, 4), torch.empty(4, 3, 2).permute(2, 1, 0)), [2, 3, 4]),
        ((torch.empty(2, 1, 4),), [1, 1, 8]),
        ((torch.empty(1, 1, 1),), [1, 1, 1]),
    ],
)
def test_collapse_visits_every_element_once(tensors: tuple[Tensor, ...], sizes: list[int]):
    got, strides = collapse(tensors[0].shape, *(t.stride() for t in tensors))
    assert got == sizes
    for tensor, steps in zip(tensors, strides, strict=True):
        seen = tensor.as_strided(got, steps)
        flat = torch.arange(tensor.untyped_storage().size()).as_strided
        visited = flat(got, steps).flatten().sort().values
        wanted = flat(tensor.shape, tensor.stride()).flatten().sort().values
        assert seen.numel() == tensor.numel()
        assert visited.equal(wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hip", [None, "6.4"])
def test_only_float32_is_multiplied_in_tf32_and_only_if_allowed(
    dtype: torch.dtype, hip: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.version, "hip", hip)
    x = torch.empty(1, dtype=dtype)
    _, precision = dot_options(x, allow_tf32=False)
    assert precision == "ieee"
    _, precision = dot_options(x, allow_tf32=True)
    assert precision == ("tf32" if dtype == torch.float32 and hip is None else "ieee")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_lie_side_by_side_are_not_copied(case: Case, dtype: torch.dtype):
    weight_dw, weight_pw = weights(case, dtype)
    ready = side_by_side(weight_dw)
    assert torch.equal(ready, weight_dw)
    G, _, R, S = ready.shape
    given = launch.pack_filters(ready, 1 << 60)
    assert given.ptr is ready or R * S == 1
    assert given.stride == (G, 1)
    x = integers(N, C, H, W, dtype=dtype)
    options = {"allow_tf32": False, "channels_last": True}
    arguments = (x, ready, weight_pw, None, None, case.geometry, None, None, None)
    y = separable_fwd(*arguments, **options)
    expected = separable_fwd(x, weight_dw, *arguments[2:], **options)
    assert_exact(y, expected)
