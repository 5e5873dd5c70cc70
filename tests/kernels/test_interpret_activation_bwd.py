"""The passes that know channels: held to the oracle, in every layout and type."""

import math

import pytest
import torch
from oracle import (
    ACTIVATIONS,
    CHANNELS_LAST,
    DENSE,
    Arithmetic,
    Layout,
    check,
    exact,
    place,
    poisoned_allocations,
    stored,
    summed,
    through_activation,
)

from sepconv.kernels import activation_bwd
from sepconv.kernels.configs import ConvShape, DepthwiseConfig, candidates, default

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Tiles that fit exactly, nearly and not at all.
SHAPE = (2, 11, 5, 7)
LAYOUTS = {
    "dense": DENSE,
    "channels_last": CHANNELS_LAST,
    "sliced": Layout(margin=1, offset=3),
    "transposed": Layout(order=(2, 0, 3, 1), step=2),
    "expanded": Layout(expanded=(2, 3)),
    "one number": Layout(expanded=(0, 1, 2, 3)),
}


def arithmetic(dtype: torch.dtype) -> Arithmetic:
    return Arithmetic(dtype, truncating=DEVICE == "cpu" and dtype == torch.bfloat16)


def run(dy, z, activation, dtype, **options):
    """The launcher on placed tensors, held to the oracle; the worst error over its bound."""
    with poisoned_allocations():
        dz, dbias = activation_bwd.activation_bwd(
            dy.tensor, z.tensor, activation, bias=True, channels_last=True, **options
        )
    dy.assert_untouched("dy")
    z.assert_untouched("z")
    assert dz.dtype == dbias.dtype == dtype
    assert dz.is_contiguous(memory_format=torch.channels_last)
    rules = arithmetic(dtype)
    right = through_activation(exact(dy.tensor), exact(z.tensor), activation, rules)
    ratio = check(dz, stored(right, rules), name="dz")
    return max(ratio, check(dbias, stored(summed(right, rules), rules), name="dbias"))


def normal(dtype, layout, scale=2.0, shape=SHAPE):
    return place((torch.randn(shape) * scale).to(dtype).to(DEVICE), layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_in_every_type(activation, dtype):
    torch.manual_seed(0)
    run(normal(dtype, DENSE), normal(dtype, CHANNELS_LAST), activation, dtype)


@pytest.mark.parametrize("layout_z", LAYOUTS)
@pytest.mark.parametrize("layout_dy", LAYOUTS)
def test_every_layout(layout_dy, layout_z):
    """Integers through relu6: equal, not close."""
    torch.manual_seed(0)
    dy, z = (
        place(torch.randint(-9, 10, SHAPE, device=DEVICE).float(), LAYOUTS[name])
        for name in (layout_dy, layout_z)
    )
    assert run(dy, z, "relu6", torch.float32, config=DepthwiseConfig(16, 8)) == 0


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 17, 1, 5), (1, 8, 4, 4), (2, 65, 3, 1)])
@pytest.mark.parametrize("programs", [1, 3, 2048])
def test_ragged_sizes_and_splits(shape, programs, monkeypatch):
    monkeypatch.setattr(activation_bwd, "_PROGRAMS", programs)
    torch.manual_seed(0)
    dy, z = normal(torch.float32, DENSE, shape=shape), normal(torch.float32, DENSE, shape=shape)
    run(dy, z, "silu", torch.float32, config=DepthwiseConfig(4, 8))


@pytest.mark.parametrize("channels_last", [True, False])
def test_every_configuration(channels_last):
    shape = ConvShape(2, 40, 4, 9, 40, 4, 9, channels_last=channels_last)
    offered = candidates("activation_bwd", torch.float16, shape)
    assert len(offered) > 5
    assert offered[0] == default("activation_bwd", torch.float16, shape)
    layout = CHANNELS_LAST if channels_last else DENSE
    for config in {c._replace(num_warps=4) for c in offered}:
        torch.manual_seed(0)
        dy, z = (normal(torch.float16, layout, shape=(2, 40, 4, 9)) for _ in range(2))
        run(dy, z, "gelu", torch.float16, config=config)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values_are_those_of_torch(activation):
    special = [math.inf, -math.inf, -1e30, -3.0, -0.5, 0.0, 0.5, 3.0, 6.0, 7.0]
    z = torch.tensor(special, dtype=torch.float64, device=DEVICE)
    for value in (1.0, -2.0, 0.0, math.inf, math.nan):
        dy = torch.full_like(z, value)
        leaf = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(ACTIVATIONS[activation].function(leaf), leaf, dy)
        dz, _ = activation_bwd.activation_bwd(
            *(t.view(1, 1, 1, -1) for t in (dy, z)), activation, bias=False, channels_last=False
        )
        torch.testing.assert_close(dz.flatten(), expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channel_sum(dtype, layout):
    torch.manual_seed(0)
    dy = normal(dtype, LAYOUTS[layout])
    with poisoned_allocations():
        sums = activation_bwd.channel_sum(dy.tensor)
    dy.assert_untouched("dy")
    rules = arithmetic(dtype)
    assert sums.dtype == dtype
    check(sums, stored(summed(exact(dy.tensor), rules), rules))


def test_the_same_bits_every_time():
    torch.manual_seed(0)
    dy = torch.randn(2, 9, 40, 41, device=DEVICE)
    first = activation_bwd.channel_sum(dy)
    for _ in range(50 if DEVICE == "cuda" else 2):
        assert torch.equal(first, activation_bwd.channel_sum(dy))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)])
def test_nothing_is_launched_for_empty_tensors(shape):
    dy = torch.empty(shape, device=DEVICE)
    dz, dbias = activation_bwd.activation_bwd(dy, dy, "relu", bias=True, channels_last=True)
    assert dz.shape == shape
    for sums in (dbias, activation_bwd.channel_sum(dy)):
        assert torch.equal(sums, torch.zeros(shape[1], device=DEVICE))
