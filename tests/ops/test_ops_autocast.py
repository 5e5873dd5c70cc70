"""Autocast: dtypes forward and backward as torch's own convolution has them."""

import pytest
import torch
import torch.nn.functional as F
from ops.calls import DEVICE, OPS, arguments, expected, public, registered, tensors_of

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("run", [public, registered])
def test_dtypes_are_those_of_torch(run, op, dtype, to, without_kernels):
    results = []
    for form in (run, _convolution):
        call = arguments(op, dtype=dtype, requires_grad=True, device=DEVICE)
        with torch.autocast(DEVICE, to):
            y = form(op, call)
        y.sum().backward()
        results.append((y.dtype, {name: t.grad.dtype for name, t in tensors_of(call).items()}))
    assert results[0] == results[1]
    assert results[0][0] == (torch.float64 if dtype == torch.float64 else to)


def _convolution(op, call):
    """One convolution of the same tensors: torch's rule, without torch's promoting addition."""
    named = tensors_of(call)
    x = named.pop("x")
    y = F.conv2d(x, torch.ones(1, 3, 1, 1, dtype=x.dtype, device=x.device)).sum()
    for tensor in named.values():
        weight = tensor.flatten()[:, None, None, None]
        y = y + F.conv2d(torch.ones_like(weight), weight[:1]).sum()
    return y


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("run", [public, registered])
def test_mixed_dtypes_meet_under_autocast(run, op, without_kernels):
    """As in torch: what would be an error outside (half weights, float images) is cast."""
    call = arguments(op, dtype=torch.float32, device=DEVICE)
    for name in list(tensors_of(call))[1:]:
        call[name] = call[name].bfloat16()
    with pytest.raises(ValueError, match="expected x's dtype float32"):
        run(op, call)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = run(op, call)
    truth = expected(op, _doubled(call))
    assert y.dtype == torch.bfloat16
    assert (y.double() - truth).abs().max() <= 0.05 * truth.abs().max()


def _doubled(call):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in call.items()}


@pytest.mark.parametrize("op", OPS)
def test_backward_under_autocast_keeps_the_dtype_of_the_forward(op, without_kernels):
    call = arguments(op, dtype=torch.float32, requires_grad=True, activation="silu", device=DEVICE)
    wanted = torch.autograd.grad(expected(op, call).sum(), list(tensors_of(call).values()))
    y = registered(op, call)
    with torch.autocast(DEVICE, torch.bfloat16):
        y.sum().backward()
    for tensor, grad in zip(tensors_of(call).values(), wanted, strict=True):
        torch.testing.assert_close(tensor.grad, grad, rtol=1e-4, atol=1e-4)


def test_weights_train_under_a_gradient_scaler():
    """The loop that mixed precision is used in, with float32 weights and a scaled loss."""
    call = arguments("separable_conv2d", dtype=torch.float32, requires_grad=True, device=DEVICE)
    weights = [call[name] for name in ("weight_dw", "weight_pw", "bias_dw", "bias_pw")]
    optimizer = torch.optim.SGD(weights, lr=0.01)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = public("separable_conv2d", call).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
