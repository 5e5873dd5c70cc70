"""The oracle must agree with the framework, and must reject every kind of wrong result."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    ACTIVATIONS,
    CHANNELS_LAST,
    Arithmetic,
    Bounded,
    Layout,
    Problem,
    backward,
    check,
    check_no_worse,
    exact,
    forward,
    place,
    poisoned_allocations,
    stored,
    through_activation,
)

from sepconv.ops import reference

INPUTS = ("x", "weight_dw", "weight_pw", "bias_dw", "bias_pw", "residual")
SHAPES = {
    "x": (2, 3, 7, 6),
    "weight_dw": (6, 1, 3, 2),
    "weight_pw": (5, 6, 1, 1),
    "bias_dw": (6,),
    "bias_pw": (5,),
    "residual": (2, 5, 4, 7),
}
GEOMETRY = {"stride": (2, 1), "padding": (2, 1, 0, 3), "dilation": (1, 2)}


def problem(dtype, *, integers=False, **changes):
    torch.manual_seed(0)

    def draw(shape):
        values = torch.randint(-2, 3, shape) if integers else torch.randn(shape)
        return values.to(dtype)

    tensors = {name: draw(shape) for name, shape in SHAPES.items()}
    return Problem(**{**tensors, **GEOMETRY, **changes})


def framework(p):
    """The same call by the framework's convolutions."""
    (top, bottom, left, right), x = p.padding, p.x
    act = {None: lambda z: z, **{name: a.function for name, a in ACTIVATIONS.items()}}
    x = F.pad(x, (left, right, top, bottom))
    z = F.conv2d(x, p.weight_dw, p.bias_dw, p.stride, 0, p.dilation, p.x.shape[1])
    z = F.conv2d(act[p.activation_mid](z), p.weight_pw, p.bias_pw)
    return act[p.activation](z + p.residual)


def gradients(p, dy):
    leaves = {name: getattr(p, name).detach().requires_grad_() for name in INPUTS}
    y = framework(dataclasses.replace(p, **leaves))
    return dict(zip(INPUTS, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def activation_pairs():
    return pytest.mark.parametrize(
        ("mid", "last"),
        [(None, None), ("relu6", "gelu"), ("silu", "relu"), ("hardswish", "hardswish")],
    )


@activation_pairs()
def test_truth_is_the_frameworks_float64_result(mid, last):
    p = problem(torch.float64, activation_mid=mid, activation=last)
    arithmetic = Arithmetic(torch.float64)
    assert check(framework(p), forward(p, arithmetic)) <= 1

    dy = torch.randn(framework(p).shape, dtype=torch.float64)
    truth = backward(p, dy, arithmetic)
    for name, grad in gradients(p, dy).items():
        assert check(grad, truth[name], name=name) <= 1
        assert torch.allclose(truth[name].value, grad, rtol=1e-12, atol=1e-12)


@activation_pairs()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_framework_stays_within_the_bound_which_is_not_loose(dtype, mid, last):
    p = problem(dtype, activation_mid=mid, activation=last)
    arithmetic = Arithmetic(dtype, composite=True)
    worst = check(framework(p), forward(p, arithmetic))
    assert 0.01 < worst <= 1

    dy = torch.randn(framework(p).shape).to(dtype)
    truth = backward(p, dy, arithmetic)
    worst = {name: check(grad, truth[name], name=name) for name, grad in gradients(p, dy).items()}
    del worst["residual"]  # dy or zero where there is no smooth activation: nothing is rounded
    assert all(0.001 < ratio <= 1 for ratio in worst.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_integers_leave_no_room(dtype, activation):
    p = problem(dtype, integers=True, activation_mid=activation, activation=activation)
    truth = forward(p, Arithmetic(dtype))
    assert not truth.error.any()
    assert check(framework(p), truth) == 0

    dy = torch.randint(-2, 3, truth.value.shape).to(dtype)
    grads = backward(p, dy, Arithmetic(dtype))
    assert not any(grad.error.any() for grad in grads.values())
    for name, grad in gradients(p, dy).items():
        assert check(grad, grads[name], name=name) == 0


def test_tf32_widens_only_what_does_not_fit_its_mantissa():
    p = problem(torch.float32)
    narrow = forward(p, Arithmetic(torch.float32))
    wide = forward(p, Arithmetic(torch.float32, tf32=True))
    assert (wide.error > 100 * narrow.error).all()
    whole = problem(torch.float32, integers=True)
    assert not forward(whole, Arithmetic(torch.float32, tf32=True)).error.any()


def last_element_stale(y):
    y[-1, -1, -1, -1] = 0


def last_rows_stale(y):
    y[..., -1, :] = y[..., 0, :]


def one_unit_off(y):
    y[0, 0, 0, 0] += 1


def one_ulp_over_the_bound(y):
    y[0, 0, 0, 0] += 2 * y.abs().max() * torch.finfo(y.dtype).eps


def infinite(y):
    y[1, 2, 3, 4] = float("inf")


def one_nan(y):
    y[1, 2, 3, 4] = float("nan")


def all_nan(y):
    y.fill_(float("nan"))


def shifted(y):
    y.copy_(y.roll(1, -1))


def channels_swapped(y):
    y.copy_(y.flip(1))


@pytest.mark.parametrize(
    "spoil",
    [
        last_element_stale,
        last_rows_stale,
        one_unit_off,
        one_ulp_over_the_bound,
        infinite,
        one_nan,
        all_nan,
        shifted,
        channels_swapped,
    ],
)
@pytest.mark.parametrize("integers", [True, False], ids=["integers", "normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_wrong_result_is_rejected(spoil, integers, dtype):
    p = problem(dtype, integers=integers)
    # the truth itself, so that only what is spoilt can be wrong
    truth = forward(p, Arithmetic(dtype))
    y = truth.value.to(dtype)
    check(y, truth)
    if spoil is one_ulp_over_the_bound and not integers:
        y[0, 0, 0, 0] = (truth.value + 1.5 * truth.error)[0, 0, 0, 0]
    else:
        spoil(y)
    with pytest.raises(AssertionError, match=r"y: \d+ of 280 elements are wrong"):
        check(y, truth)


def test_a_wrong_shape_is_rejected():
    truth = forward(problem(torch.float32), Arithmetic(torch.float32))
    with pytest.raises(AssertionError, match="shape"):
        check(torch.zeros(2, 5, 4, 6), truth)


def test_nan_and_infinity_must_be_where_the_truth_has_them():
    p = problem(torch.float32, integers=True, activation="relu")
    p.x[0, 1, 2, 3] = float("nan")
    p.weight_pw[0, 0] = float("inf")
    truth = forward(p, Arithmetic(torch.float32))
    assert truth.value.isnan().any()
    assert truth.value.isinf().any()
    check(framework(p), truth)
    with pytest.raises(AssertionError, match="wrong"):
        check(framework(p).nan_to_num(nan=0.0), truth)
    with pytest.raises(AssertionError, match="wrong"):
        check(framework(p).clamp(max=1e30), truth)


def test_infinite_weights_at_the_border_may_meet_padding_or_not():
    p = problem(torch.float32, integers=True)
    p.weight_dw[0, 0, 0, 0] = float("inf")
    multiplied = forward(p, Arithmetic(torch.float32))
    skipped = forward(p, Arithmetic(torch.float32, skips_padding=True))
    differ = multiplied.value.isnan() & ~skipped.value.isnan()
    assert differ.any()
    for right in (multiplied, skipped):
        check(right.value.float(), multiplied, skipped)
    with pytest.raises(AssertionError, match="wrong"):
        check(torch.where(differ, 0.0, skipped.value).float(), multiplied, skipped)


def test_what_overflows_the_dtype_is_infinite_and_what_is_near_may_be():
    truth = Bounded(torch.tensor([7e4, 6e4, -7e4]).double(), torch.tensor([1.0, 1.0, 1.0]))
    inf = float("inf")
    check(torch.tensor([inf, 6e4, -inf], dtype=torch.float16), truth)
    with pytest.raises(AssertionError, match="1 of 3"):
        check(torch.tensor([inf, inf, -inf], dtype=torch.float16), truth)
    with pytest.raises(AssertionError, match="1 of 3"):
        check(torch.tensor([-inf, 6e4, -inf], dtype=torch.float16), truth)


def test_a_kink_is_in_doubt_only_within_the_error_of_its_argument():
    # relu at z = 0 exactly has slope zero; at a z known to 1e-8 only it may have slope one
    x = torch.zeros(1, 1, 1, 1)
    p = Problem(x, weight_pw=torch.ones(1, 1, 1, 1), activation="relu")
    dy = torch.ones(1, 1, 1, 1)
    assert not backward(p, dy, Arithmetic(torch.float32))["x"].error.any()
    tenth = dataclasses.replace(
        p, x=torch.full((1, 2, 1, 1), 0.1), weight_pw=torch.tensor([[1.0, -1.0]])[..., None, None]
    )
    assert (backward(tenth, dy, Arithmetic(torch.float32))["x"].error >= 1).all()


def test_second_opinion():
    truth = forward(problem(torch.float32), Arithmetic(torch.float32))
    theirs = (truth.value + 1e-5).float()
    check_no_worse((truth.value - 1.9e-5).float(), theirs, truth, factor=2)
    with pytest.raises(AssertionError, match="framework"):
        check_no_worse((truth.value - 3e-5).float(), theirs, truth, factor=2)
    with pytest.raises(AssertionError, match="framework"):
        check_no_worse(torch.full_like(theirs, float("nan")), theirs, truth, factor=2)


LAYOUTS = [
    Layout(),
    CHANNELS_LAST,
    Layout(margin=2),
    Layout(step=2, offset=3),
    Layout(order=(3, 1, 0, 2), offset=15),
    Layout(expanded=(0, 2)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_placed_tensors_lie_in_nan(layout):
    values = torch.randn(2, 3, 4, 5)
    placed = place(values, layout)
    for dim in layout.expanded:
        assert placed.tensor.stride(dim) == 0
        values = values.narrow(dim, 0, 1).expand(values.shape)
    assert torch.equal(placed.tensor, values)
    own = {
        int(i) for i in torch.as_strided(
            torch.arange(placed.buffer.numel()),
            placed.tensor.shape, placed.tensor.stride(), placed.tensor.storage_offset(),
        ).flatten()
    }  # fmt: skip
    around = [i for i in range(placed.buffer.numel()) if i not in own]
    assert min(own) - min(around) >= values.numel() // 2
    assert max(around) - max(own) >= values.numel() // 2
    assert placed.buffer[around].isnan().all()
    assert placed.buffer.untyped_storage().data_ptr() == placed.tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [(2, 0, 4, 4), (0, 3, 4, 4), (3,), ()])
def test_small_tensors_can_be_placed(shape):
    values = torch.randn(shape)
    assert torch.equal(place(values, Layout(offset=1)).tensor, values)


@pytest.mark.parametrize("distance", [-1, 0, 24])
def test_writing_to_an_input_or_beside_it_is_noticed(distance):
    placed = place(torch.zeros(2, 3, 4))
    placed.assert_untouched("x")
    placed.buffer[placed.tensor.storage_offset() + distance] = 1.0
    with pytest.raises(AssertionError, match="wrote to its input x"):
        placed.assert_untouched("x")


def test_allocations_start_as_nan():
    like = torch.zeros(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    with poisoned_allocations():
        made = [
            torch.empty(2, 3),
            torch.empty((1, 2, 3, 3), memory_format=torch.channels_last),
            torch.empty_like(like),
            torch.empty_strided((2, 2), (3, 1)),
            like.new_empty(4),
            torch.empty(3, dtype=torch.float16),
        ]
        assert torch.empty(3, dtype=torch.int32).tolist() == [2**31 - 1] * 3
    assert all(t.isnan().all() for t in made)
    assert made[1].is_contiguous(memory_format=torch.channels_last)
    assert made[2].is_contiguous(memory_format=torch.channels_last)
    assert made[3].stride() == (3, 1)
    assert made[5].dtype == torch.float16
    assert not torch.empty(10**5).isnan().all()


@poisoned_allocations()
def write_beside_an_allocation(distance):
    y = torch.empty(2, 3)
    torch.as_strided(y, (1,), (1,), y.storage_offset() + distance).fill_(0.0)


@pytest.mark.parametrize("distance", [-1, 6, 100])
def test_writing_outside_an_allocation_is_noticed(distance):
    with pytest.raises(AssertionError, match=r"outside a \(2, 3\) tensor"):
        write_beside_an_allocation(distance)
    write_beside_an_allocation(5)


def test_what_may_be_anything_still_may_once_it_is_stored():
    open_ends = Bounded(
        torch.tensor([math.nan, math.inf, 1.0]).double(), torch.full((3,), math.inf)
    )
    for dtype in (torch.float32, torch.bfloat16):
        kept = stored(open_ends, Arithmetic(dtype, truncating=dtype == torch.bfloat16))
        for value in (math.inf, -math.inf, math.nan, 0.0):
            assert check(torch.full((3,), value, dtype=dtype), kept) == 0


_SPECIAL = [math.nan, math.inf, -math.inf, -1e300, 1e308, -3.0, -0.0, 0.0, 1.0, 3.0, 4.0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_the_framework_on_a_cpu(name, device):
    """Where its operators are right: on a GPU float64's hardswish is not."""
    values = torch.cat([torch.tensor(_SPECIAL).double(), torch.linspace(-9, 9, 1000).double()])
    z = values.to(device).requires_grad_()
    y = ACTIVATIONS[name].function(z)
    close = {"rtol": 1e-13, "atol": 1e-13, "equal_nan": True}
    torch.testing.assert_close(y.detach().cpu(), reference.activate(values, name), **close)
    (slope,) = torch.autograd.grad(y, z, torch.ones_like(y))
    # At NaN the framework's loops differ among themselves.
    right = reference.activation_backward(torch.ones_like(values), values, name)
    torch.testing.assert_close(slope[1:].cpu(), right[1:], **close)


@pytest.mark.parametrize("name", ["silu", "hardswish", "gelu"])
def test_the_framework_keeps_within_the_bound_of_each_slope(name):
    z = torch.linspace(-40, 40, 160_001)
    dz = reference.activation_backward(torch.ones_like(z), z, name)
    right = through_activation(exact(torch.ones_like(z)), exact(z), name, Arithmetic(z.dtype))
    assert 0.1 < check(dz, right) <= 1
    with pytest.raises(AssertionError, match="wrong"):
        check(dz * (1 + 64 * torch.finfo(z.dtype).eps), right)
