"""Means and variances that the convolutions collect, and batch normalisation with them."""

import pytest
import torch
import torch.nn.functional as F
from oracle import ACTIVATIONS, Arithmetic, Problem, forward, poisoned_allocations
from torch import Tensor

from sepconv.kernels import depthwise, normalise, pointwise, statistics
from sepconv.kernels.configs import DepthwiseConfig, GemmConfig
from sepconv.kernels.geometry import Geometry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
AXES = (0, 2, 3)
SAME = Geometry(padding=(1, 1, 1, 1))
# Strips of several rows and of none, tiles that fit and that do not.
CONFIGS = [
    DepthwiseConfig(16, 16), DepthwiseConfig(16, 8, 4), DepthwiseConfig(8, 16, 3),
    DepthwiseConfig(8, 16, 3, columns=2), None,
]  # fmt: skip


def tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).to(DEVICE) for shape in shapes]


def assert_statistics(mean: Tensor, var: Tensor, z: Tensor) -> None:
    """Held to the bound of an accurate two-pass algorithm (Chan et al., section 3), times ten."""
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    assert mean.dtype == var.dtype == wide
    z = z.double()
    count = z.numel() // z.shape[1]
    true_var, true_mean = torch.var_mean(z, AXES, correction=0)
    unit = torch.finfo(wide).eps / 2
    size = z.abs().amax(AXES)
    error = 10 * unit * size * count.bit_length()
    assert ((mean - true_mean).abs() <= error).all()
    # How much a rounding of each value can move the variance: linear in the mean, never its square.
    assert ((var - true_var).abs() <= 2 * error * true_var.sqrt() + 10 * unit * true_var).all()


def accurate(dtype: torch.dtype, problem: Problem) -> Tensor:
    """The convolution before it is rounded to its type."""
    return forward(problem, Arithmetic(torch.float64)).value


@pytest.mark.parametrize("offset", [0.0, 1000.0], ids=["", "far from zero"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_depthwise(dtype, config, stride, offset):
    """Far from zero a sum of squares would leave no digit of the variance."""
    x, weight = tensors(dtype, (2, 3, 6, 7), (6, 1, 3, 3))
    bias = torch.full((6,), offset, dtype=dtype, device=DEVICE)
    geometry = Geometry((stride, stride), (1, 1, 1, 1))
    with poisoned_allocations():
        y, mean, var = depthwise.depthwise_fwd_statistics(
            x, weight, bias, geometry, channels_last=True, config=config
        )
    plain = depthwise.depthwise_fwd(
        x, weight, bias, geometry, None, channels_last=True, config=config
    )
    assert torch.equal(y, plain)
    problem = Problem(x, weight, bias_dw=bias, stride=geometry.stride, padding=geometry.padding)
    assert_statistics(mean, var, accurate(dtype, problem).to(mean.dtype))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_pointwise(dtype, channels_last):
    x, weight = tensors(dtype, (3, 6, 5, 7), (13, 6, 1, 1))
    bias = torch.full((13,), 100.0, dtype=dtype, device=DEVICE)
    config = GemmConfig(16, 16, 16)
    options = {"allow_tf32": False, "channels_last": channels_last, "config": config}
    with poisoned_allocations():
        y, mean, var = pointwise.pointwise_fwd_statistics(x, weight, bias, **options)
    assert torch.equal(y, pointwise.pointwise_fwd(x, weight, bias, None, None, **options))
    problem = Problem(x, weight_pw=weight, bias_pw=bias)
    assert_statistics(mean, var, accurate(dtype, problem).to(mean.dtype))


@pytest.mark.parametrize("tiles", [1, 2, 31, 64, 65, 300])
def test_triples_of_unequal_counts_combine(tiles, monkeypatch):
    monkeypatch.setattr(statistics, "_MOST_TRIPLES", 4)
    torch.manual_seed(0)
    counts = torch.randint(0, 5, (tiles,), device=DEVICE)
    counts[0] += 1
    parts = [torch.randn(int(n), 37, dtype=torch.float64, device=DEVICE) + 5 for n in counts]
    y = torch.cat(parts).t().reshape(1, 37, 1, -1)
    partial = statistics.Partial(y, tiles)
    partial.triples.counts.copy_(counts)
    for i, part in enumerate(parts):
        mean = part.mean(0) if len(part) else torch.zeros(37, dtype=y.dtype)
        partial.triples.moments[i, 0] = mean
        partial.triples.moments[i, 1] = (part - mean).square().sum(0)
    with poisoned_allocations():
        mean, var = partial.combine()
    assert_statistics(mean, var, y)


def test_constant_channels_have_no_variance():
    x = torch.full((2, 3, 8, 8), 1e4, device=DEVICE)
    weight = torch.full((3, 1, 1, 1), 3.0, device=DEVICE)
    _, mean, var = depthwise.depthwise_fwd_statistics(
        x, weight, None, Geometry(), channels_last=True
    )
    assert torch.equal(mean, torch.full((3,), 3e4, device=DEVICE))
    assert torch.equal(var, torch.zeros(3, device=DEVICE))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel(value):
    x, weight = tensors(torch.float32, (2, 3, 5, 5), (3, 1, 3, 3))
    x[1, 1, 2, 2] = value
    _, mean, var = depthwise.depthwise_fwd_statistics(x, weight, None, SAME, channels_last=True)
    assert mean.isfinite().tolist() == var.isfinite().tolist() == [True, False, True]


def test_the_same_bits_every_time():
    x, weight = tensors(torch.float32, (2, 5, 11, 17), (5, 1, 3, 3))

    def run():
        return depthwise.depthwise_fwd_statistics(x, weight, None, SAME, channels_last=True)

    first = run()
    for _ in range(50 if DEVICE == "cuda" else 2):
        assert all(map(torch.equal, first, run()))


def test_of_nothing():
    nothing = torch.empty(0, 3, 4, 5, device=DEVICE)
    weight = torch.ones(2, 3, 1, 1, device=DEVICE)
    y, mean, var = pointwise.pointwise_fwd_statistics(
        nothing, weight, None, allow_tf32=False, channels_last=True
    )
    assert y.shape == (0, 2, 4, 5)
    assert mean.isnan().all()
    assert var.isnan().all()


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu", "hardswish", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_normalisation(dtype, activation):
    z, dy = tensors(dtype, (2, 7, 5, 11), (11, 2, 14, 5))
    dy = dy.permute(1, 2, 3, 0)[:, ::2]
    weight, bias = (t.requires_grad_() for t in tensors(dtype, (7,), (14,)))
    bias = bias[::2]
    leaf = z.double().requires_grad_()
    w, b = (t.detach().double().requires_grad_() for t in (weight, bias))
    y = F.batch_norm(leaf, None, None, w, b, True, 0.1, 1e-3)
    y = y if activation is None else ACTIVATIONS[activation].function(y)
    dz, dw, db = torch.autograd.grad(y, (leaf, w, b), dy.double())

    var, mean = (t.to(dtype) for t in torch.var_mean(z.double(), AXES, correction=0))
    norm = normalise.normalisation(mean, var, weight.detach(), bias.detach())
    config = DepthwiseConfig(32, 8)
    options = {"channels_last": True, "config": config}
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0, "atol": 2e-5}
    with poisoned_allocations():
        got = normalise.normalise_fwd(z, norm, 1e-3, activation, **options)
        got_dz, sums = normalise.normalise_bwd(dy, z, norm, 1e-3, activation, **options)
    for ours, truth in (
        (got, y),
        (got_dz, dz),
        (sums[0], db),
        (sums[1] * torch.rsqrt(var + 1e-3), dw),
    ):
        torch.testing.assert_close(ours, truth.to(dtype), **close)


def test_bounds_notice_a_wrong_variance():
    """The check itself: a naive sum of squares in float32 does not pass it."""
    z = tensors(torch.float32, (4, 3, 9, 9))[0] + 3000
    mean = z.mean(AXES)
    naive = z.square().mean(AXES) - mean.square()
    with pytest.raises(AssertionError):
        assert_statistics(mean, naive, z)
