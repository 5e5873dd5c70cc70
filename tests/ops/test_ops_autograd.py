"""Gradients through the registered operators and the kernels, against torch's own autograd."""

import pytest
import torch
from ops.calls import (
    ACTIVATIONS,
    DEVICE,
    OPS,
    arguments,
    expected,
    public,
    registered,
    tensors_of,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from sepconv import backend, nn
from sepconv.ops.activation import before_activation


def _with_kernels(op, call):
    with backend("triton"):
        return public(op, call)


def _grads(run, op, call, dy, wanted=None):
    tensors = tensors_of(call)
    y = run(op, call)
    chosen = [tensors[name] for name in wanted or tensors]
    return torch.autograd.grad(y, chosen, dy(y) if callable(dy) else dy)


def _assert_same_gradients(run, op, call, dy, wanted=None):
    ours = _grads(run, op, call, dy, wanted)
    truth = _grads(expected, op, call, dy, wanted)
    for name, a, b in zip(wanted or tensors_of(call), ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("run", [registered, _with_kernels])
def test_gradients(run, op, activation):
    call = arguments(op, requires_grad=True, activation=activation, device=DEVICE)
    _assert_same_gradients(run, op, call, torch.ones_like)


# Each makes a gradient of y's shape that is not a dense tensor of its own in y's layout.
INCOMING = {
    "expanded by sum": lambda y: torch.ones((), dtype=y.dtype, device=y.device).expand_as(y),
    "transposed": lambda y: torch.randn_like(y.transpose(1, 3).contiguous()).transpose(1, 3),
    "every second": lambda y: torch.randn(
        *y.shape[:3], 2 * y.shape[3], dtype=y.dtype, device=y.device
    )[..., ::2],
    "half of a cat": lambda y: torch.randn_like(torch.cat([y, y], 1))[:, y.shape[1] :],
    "channels_last": lambda y: torch.randn_like(y).to(memory_format=torch.channels_last),
    "broadcast over images": lambda y: torch.randn_like(y[:1]).expand_as(y),
}


@pytest.mark.parametrize("incoming", INCOMING)
@pytest.mark.parametrize("op", OPS)
def test_gradients_that_come_in_any_strides(op, incoming):
    call = arguments(op, requires_grad=True, activation="relu", device=DEVICE)
    dy = INCOMING[incoming](expected(op, call).detach())
    _assert_same_gradients(registered, op, call, dy)


@pytest.mark.parametrize("op", OPS)
def test_only_some_inputs_want_gradients(op, without_kernels):
    names = list(tensors_of(arguments(op)))
    for wanted in [[name] for name in names] + [names[1:], names[:-1]]:
        for activation in ("relu", "gelu"):
            call = arguments(op, activation=activation, device=DEVICE)
            for name in wanted:
                call[name].requires_grad_()
            _assert_same_gradients(registered, op, call, torch.ones_like, wanted)


@pytest.mark.parametrize("activation", ["relu6", "silu", "gelu"])
@pytest.mark.parametrize("op", OPS)
def test_second_derivatives(op, activation, without_kernels):
    call = arguments(op, requires_grad=True, activation=activation, device=DEVICE)
    tensors = tensors_of(call)

    def run(*values):
        return registered(op, {**call, **dict(zip(tensors, values, strict=True))})

    assert gradcheck(run, tuple(tensors.values()), fast_mode=True)
    assert gradgradcheck(run, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("op", ["pointwise_conv2d", "separable_conv2d"])
def test_second_derivatives_of_the_kernels(op):
    call = arguments(op, requires_grad=True, activation="silu", device=DEVICE)
    tensors = tuple(tensors_of(call).values())

    def penalty(run):
        grads = torch.autograd.grad(run(op, call).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    for ours, truth in zip(penalty(_with_kernels), penalty(expected), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-8)


def test_backward_follows_the_forward_out_of_the_with_block():
    """The kernels' graph holds their operators, whatever backend is chosen by then."""
    call = arguments("separable_conv2d", requires_grad=True, activation="relu", device=DEVICE)
    y = _with_kernels("separable_conv2d", call)
    with backend("reference"):
        y.sum().backward()
    truth = _grads(expected, "separable_conv2d", call, torch.ones_like)
    for tensor, wanted in zip(tensors_of(call).values(), truth, strict=True):
        torch.testing.assert_close(tensor.grad, wanted)


def test_the_same_input_and_weights_twice(without_kernels):
    def twice(run):
        call = arguments("depthwise_conv2d", requires_grad=True, device=DEVICE)
        x, weight = call["x"], call["weight_dw"][::2].detach().clone().requires_grad_()
        call = {**call, "weight_dw": weight, "bias": None, "activation": "relu"}
        call |= {"stride": 1, "padding": "same", "dilation": 1}
        if run is expected:
            half = torch.nn.functional.conv2d
            y = half(x, weight, padding="same", groups=3).relu()
            y = half(y, weight, padding="same", groups=3).relu() + y + x
        else:
            with backend("reference") if run is public else backend("auto"):
                y = public("depthwise_conv2d", call)
                y = public("depthwise_conv2d", {**call, "x": y}) + y + x
        return torch.autograd.grad(y.sum(), (x, weight))

    for ours, wanted in zip(twice(public), twice(expected), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant, without_kernels):
    call = arguments("separable_conv2d", requires_grad=True, activation="silu", device=DEVICE)
    truth = _grads(expected, "separable_conv2d", call, torch.ones_like)
    tensors = tensors_of(call)

    def run(*values):
        return registered("separable_conv2d", {**call, **dict(zip(tensors, values, strict=True))})

    checkpoint(run, *tensors.values(), use_reentrant=use_reentrant).sum().backward()
    for tensor, wanted in zip(tensors.values(), truth, strict=True):
        torch.testing.assert_close(tensor.grad, wanted)


def test_nothing_of_the_depthwise_half_is_saved(without_kernels):
    """The separable backward computes it again: it is M times as large as the input."""
    call = arguments("separable_conv2d", requires_grad=True, activation="relu")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        y = registered("separable_conv2d", call)
    held = {t.untyped_storage().data_ptr() for t in [*tensors_of(call).values(), y]}
    assert saved
    assert {t.untyped_storage().data_ptr() for t in saved} <= held


@pytest.mark.parametrize("incoming", INCOMING)
@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
def test_gradients_in_front_of_an_activation(activation, incoming):
    """The operators under the backward passes, and their own gradients to any order."""
    torch.manual_seed(0)
    z = torch.randn(2, 5, 4, 3, dtype=torch.float64, device=DEVICE).requires_grad_()
    dy = INCOMING[incoming](z.detach())
    leaf = z.detach().clone().requires_grad_()
    (truth,) = torch.autograd.grad(ACTIVATIONS[activation](leaf), leaf, dy)
    dz, dbias = before_activation(dy, z.detach(), activation, True)
    torch.testing.assert_close(dz, truth)
    torch.testing.assert_close(dbias, truth.sum((0, 2, 3)))
    dy = dy.clone().requires_grad_()

    def both(dy, z):
        return before_activation(dy, z, activation, True)

    assert gradcheck(both, (dy, z), fast_mode=True)
    assert gradgradcheck(both, (dy, z), fast_mode=True)


def test_many_gradients_at_once():
    """`vmap` over a backward pass whose own gradients nobody wants: the kernels' rule for it."""
    call = arguments("separable_conv2d", requires_grad=True, activation="relu", device=DEVICE)
    tensors = tuple(tensors_of(call).values())
    y = _with_kernels("separable_conv2d", call)
    dys = torch.randn(3, *y.shape, dtype=y.dtype, device=DEVICE)
    ours = torch.autograd.grad(y, tensors, dys, is_grads_batched=True)
    truth = [_grads(expected, "separable_conv2d", call, dy) for dy in dys]
    for i, of_one in enumerate(zip(*truth, strict=True)):
        torch.testing.assert_close(ours[i], torch.stack(of_one))


# ---- torch.func -------------------------------------------------------------------------------

IMAGES = {"depthwise_conv2d": ["x"], "pointwise_conv2d": ["x", "residual"]}
IMAGES["separable_conv2d"] = IMAGES["pointwise_conv2d"]


@pytest.mark.parametrize("run", [public, registered])
@pytest.mark.parametrize("op", OPS)
def test_vmap(op, run, without_kernels):
    call = arguments(op, activation="silu", device=DEVICE)
    everything = list(tensors_of(call))
    for names in (IMAGES[op], ["x"], everything[1:2], everything):
        batches = [torch.stack([call[n], -call[n], 2 * call[n]], dim=1) for n in names]

        def one(*values, names=names):
            return run(op, {**call, **dict(zip(names, values, strict=True))})

        ours = vmap(one, in_dims=1)(*batches)
        wanted = torch.stack([one(*(b.select(1, i) for b in batches)) for i in range(3)])
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("run", [public, registered])
def test_per_sample_gradients(run, without_kernels):
    call = arguments("separable_conv2d", activation="relu6", device=DEVICE)
    call["residual"] = None
    names = [n for n in tensors_of(call) if n != "x"]
    weights = [call[n] for n in names]

    def loss(weights, image, run=run):
        values = dict(zip(names, weights, strict=True))
        return run("separable_conv2d", {**call, **values, "x": image[None]}).square().sum()

    ours = vmap(grad(loss), in_dims=(None, 0))(weights, call["x"])
    for i, image in enumerate(call["x"]):
        leaves = [w.detach().clone().requires_grad_() for w in weights]
        call["residual"] = torch.zeros(1, 4, 3, 6, dtype=torch.float64, device=DEVICE)
        truth = torch.autograd.grad(loss(leaves, image, expected), leaves)
        call["residual"] = None
        for name, a, b in zip(names, ours, truth, strict=True):
            torch.testing.assert_close(a[i], b, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("run", [public, registered])
def test_derivatives_of_derivatives_by_functions(run, without_kernels):
    call = arguments("depthwise_conv2d", activation="silu", device=DEVICE)
    small = {**call, "x": call["x"][:1, :, :4, :3]}

    def loss(weight, run=run):
        return run("depthwise_conv2d", {**small, "weight_dw": weight}).square().sum()

    weight = call["weight_dw"]
    ours = jacrev(grad(loss))(weight)
    truth = jacrev(grad(lambda w: loss(w, expected)))(weight)
    torch.testing.assert_close(ours, truth)


def test_forward_mode_is_refused_not_lost(without_kernels):
    call = arguments("depthwise_conv2d", activation="silu", device=DEVICE)

    def of(run):
        return jvp(lambda x: run("depthwise_conv2d", {**call, "x": x}), (call["x"],), (call["x"],))

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        of(registered)
    with backend("reference"):
        torch.testing.assert_close(of(public), of(expected))


def test_functional_call_of_the_module():
    module = nn.SeparableConv2d(3, 4, 3, padding=1, channel_multiplier=2).double()
    weights = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)

    def loss(weights):
        return functional_call(module, weights, (x,)).square().sum()

    ours = grad(loss)(weights)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad)


@pytest.mark.parametrize("activation", ["relu", "silu", "hardswish", "gelu"])
@pytest.mark.parametrize("op", OPS)
def test_bias_and_activation_go_back_in_one_operator(op, activation, without_kernels):
    call = arguments(op, requires_grad=True, activation=activation)
    y = registered(op, call)
    with torch.profiler.profile() as profile:
        y.backward(torch.ones_like(y))
    names = [event.name for event in profile.events()]
    activations = 2 if op == "separable_conv2d" else 1
    assert names.count("sepconv::activation_backward") == activations
    assert "sepconv::channel_sum" not in names


@pytest.mark.parametrize("op", OPS)
def test_a_gradient_with_a_graph_used_with_its_result(op, without_kernels):
    """The node of an activation outside has two outputs, and here gradients for both."""
    call = arguments(op, requires_grad=True, activation="silu")
    chosen = list(tensors_of(call).values())

    def penalty(run):
        y = run(op, call)
        first = torch.autograd.grad(y.square().sum(), chosen, create_graph=True)
        return torch.autograd.grad(y.sum() + sum(g.square().sum() for g in first), chosen)

    torch.testing.assert_close(penalty(registered), penalty(expected), rtol=1e-10, atol=1e-10)
