"""A convolution with its batch normalisation, against torch's own of both."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ops.calls import ACTIVATIONS, DEVICE
from torch.autograd import gradcheck, gradgradcheck

from sepconv import backend, ops
from sepconv.ops import batch_norm

C, K, EPS, MOMENTUM = 6, 9, 1e-3, 0.3


class Layer(torch.nn.Module):
    """A convolution and a BatchNorm, in one call or as torch has them."""

    def __init__(self, depthwise, activation=None, bias=False):
        super().__init__()
        torch.manual_seed(0)
        options = {"padding": 1, "groups": C, "stride": 2} if depthwise else {}
        size = 3 if depthwise else 1
        out = 2 * C if depthwise else K
        self.conv = torch.nn.Conv2d(C, out, size, bias=bias, **options)
        self.norm = torch.nn.BatchNorm2d(out, EPS, MOMENTUM)
        torch.nn.init.normal_(self.norm.weight)
        torch.nn.init.normal_(self.norm.bias)
        self.depthwise, self.activation = depthwise, activation
        self.to(DEVICE)

    def forward(self, x):
        if self.depthwise is None:
            return ACTIVATIONS[self.activation](self.norm(self.conv(x)))
        norm = ops.BatchNorm.of(self.norm)
        end = {"bias": self.conv.bias, "activation": self.activation}
        if self.depthwise:
            return ops.depthwise_conv2d_batch_norm(
                x, self.conv.weight, norm, stride=2, padding=1, **end
            )
        return ops.pointwise_conv2d_batch_norm(x, self.conv.weight, norm, **end)

    def plain(self):
        """The same layer by torch's own modules."""
        other = copy.deepcopy(self)
        other.depthwise = None
        return other


def images(*shape, dtype=torch.float32, channels_last=True):
    torch.manual_seed(1)
    x = torch.randn(shape, device=DEVICE).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def assert_same(layer, x, tolerance, batches=2):
    """Results, gradients and running statistics over several batches."""
    other = layer.plain()
    for i in range(batches):
        results = []
        for model in (layer, other):
            leaf = (x + i).detach().requires_grad_()
            model.zero_grad()
            y = model(leaf)
            torch.manual_seed(2)
            (y * torch.randn(y.shape, device=DEVICE).to(y)).sum().backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
            results.append({"y": y, "x": leaf.grad, **grads, **dict(model.named_buffers())})
        for name, wanted in results[1].items():
            ours = results[0][name]
            assert ours.dtype == wanted.dtype, name
            torch.testing.assert_close(
                ours, wanted, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert results[0]["y"].stride() == results[1]["y"].stride()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depthwise", [True, False], ids=["depthwise", "pointwise"])
def test_as_torch_has_it(depthwise, activation):
    layer = Layer(depthwise, activation, bias=activation == "relu").double()
    with backend("triton"):
        assert_same(layer, images(2, C, 5, 4, dtype=torch.float64), 1e-10)


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("depthwise", [True, False], ids=["depthwise", "pointwise"])
def test_in_float32(depthwise, channels_last):
    with backend("triton"):
        assert_same(
            Layer(depthwise, "relu6"), images(2, C, 4, 3, channels_last=channels_last), 1e-4
        )


@pytest.mark.parametrize("depthwise", [True, False], ids=["depthwise", "pointwise"])
def test_by_torchs_own_operators(depthwise, without_kernels):
    layer = Layer(depthwise, "silu").double()
    x = images(2, C, 5, 4, dtype=torch.float64)
    with backend("reference"):
        assert_same(layer, x, 1e-12)
    pick = torch.ops.sepconv
    norm = (layer.norm.weight, layer.norm.bias, EPS, "silu")
    if depthwise:
        made = pick.depthwise_conv2d_statistics(
            x, layer.conv.weight, None, (2, 2), (1,) * 4, (1, 1)
        )
    else:
        made = pick.pointwise_conv2d_statistics(x, layer.conv.weight, None)
    torch.testing.assert_close(pick.batch_norm(*made, *norm), layer.plain()(x))


@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
def test_second_derivatives(activation, without_kernels):
    torch.manual_seed(0)
    leaves = [
        torch.randn(shape, dtype=torch.float64, device=DEVICE).requires_grad_()
        for shape in ((2, 3, 3, 2), (2, 3, 1, 1), (2,), (2,))
    ]

    def run(x, weight_pw, weight, bias):
        z, mean, var = torch.ops.sepconv.pointwise_conv2d_statistics(x, weight_pw, None)
        return torch.ops.sepconv.batch_norm(z, mean, var, weight, bias, EPS, activation)

    assert gradcheck(run, leaves, fast_mode=True)
    assert gradgradcheck(run, leaves, fast_mode=True)


def test_compiles_whole(without_kernels, monkeypatch):
    """By the registered operators, as on a GPU."""
    monkeypatch.setattr(batch_norm, "chooses_kernels", lambda x: True)
    torch.compiler.reset()
    layers = torch.nn.Sequential(Layer(True, "relu"), torch.nn.Conv2d(2 * C, C, 1).to(DEVICE))
    layers.append(Layer(False, "silu"))
    other = torch.nn.Sequential(layers[0].plain(), layers[1], layers[2].plain())
    x = images(2, C, 6, 5)
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    results = []
    for model in (compiled, other):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *layers[1].parameters()])))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(layers.named_buffers()), dict(other.named_buffers()))


def test_opcheck(without_kernels):
    x = images(2, C, 5, 4).requires_grad_()
    weight_dw = torch.randn(2 * C, 1, 3, 3, device=DEVICE, requires_grad=True)
    weight_pw = torch.randn(K, C, 1, 1, device=DEVICE, requires_grad=True)
    z, dy = (images(2, K, 5, 4, channels_last=last).requires_grad_() for last in (True, False))
    var, mean = torch.var_mean(z.detach(), (0, 2, 3), correction=0)
    weight, bias = (torch.randn(K, device=DEVICE, requires_grad=True) for _ in range(2))
    for op, args in (
        ("depthwise_conv2d_statistics", (x, weight_dw, None, (2, 1), (1, 0, 2, 1), (1, 2))),
        ("pointwise_conv2d_statistics", (x, weight_pw, bias)),
        ("batch_norm", (z, mean, var, weight, bias, EPS, "gelu")),
        ("batch_norm_backward", (dy, z, mean, var, weight, None, EPS, "relu")),
    ):
        results = torch.library.opcheck(getattr(torch.ops.sepconv, op).default, args)
        assert set(results.values()) == {"SUCCESS"}
        assert len(results) == 4


def test_opcheck_with_kernels():
    z = images(2, K, 5, 4).requires_grad_()
    var, mean = torch.var_mean(z.detach(), (0, 2, 3), correction=0)
    weight = torch.randn(K, device=DEVICE, requires_grad=True)
    pointwise = torch.randn(K, K, 1, 1, device=DEVICE, requires_grad=True)
    for op, args in (
        ("pointwise_conv2d_statistics", (z, pointwise, None)),
        ("batch_norm", (z, mean, var, weight, None, EPS, "relu")),
        ("batch_norm_backward", (z, z, mean, var, weight, None, EPS, None)),
    ):
        torch.library.opcheck(getattr(torch.ops.sepconv, op).default, args)


def test_per_sample_statistics(without_kernels):
    """Under `vmap` each sample is a batch of its own."""
    x, weight = images(6, C, 5, 4).view(3, 2, C, 5, 4), torch.randn(K, C, 1, 1, device=DEVICE)

    def one(x):
        with backend("reference"):
            return ops.pointwise_conv2d_batch_norm(x, weight, ops.BatchNorm(), activation="relu")

    def registered(x):
        made = torch.ops.sepconv.pointwise_conv2d_statistics(x, weight, None)
        return torch.ops.sepconv.batch_norm(*made, None, None, 1e-5, "relu")

    torch.testing.assert_close(torch.vmap(registered)(x), torch.stack([one(each) for each in x]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_statistics_in_float32(dtype, without_kernels):
    layer = Layer(True)
    with torch.autocast(DEVICE, dtype):
        y = layer(images(2, C, 6, 4))
        made = torch.ops.sepconv.depthwise_conv2d_statistics(
            images(2, C, 6, 4).to(dtype),
            layer.conv.weight.to(dtype),
            None,
            (2, 2),
            (1,) * 4,
            (1, 1),
        )
        normal = torch.ops.sepconv.batch_norm(*made, layer.norm.weight, layer.norm.bias, EPS, None)
    assert y.dtype == normal.dtype == dtype
    assert made[1].dtype == made[2].dtype == torch.float32
    torch.testing.assert_close(normal.float(), y.float(), rtol=0.02, atol=0.02)


def test_momentum_none_averages_all_batches():
    norm = torch.nn.BatchNorm2d(C, momentum=None)
    ours = copy.deepcopy(norm)
    for i in range(3):
        x = images(2, C, 4, 4) + i
        norm(x)
        weight = torch.eye(C).view(C, C, 1, 1)
        ops.pointwise_conv2d_batch_norm(x, weight, ops.BatchNorm.of(ours))
        torch.testing.assert_close(ours.state_dict(), norm.state_dict())


WRONG = [
    (
        {"norm": {"weight": torch.ones(C + 1)}},
        r"norm.weight: expected shape \[9\], got shape \[7\]",
    ),
    ({"norm": {"bias": 1.0}}, r"norm.bias: expected a floating point tensor \[9\].*got float"),
    ({"norm": {"running_mean": torch.ones(9).int()}}, "norm.running_mean: .*got dtype int32"),
    ({"norm": {"running_var": torch.ones(9, device="meta")}}, "norm.running_var: .* device meta"),
    ({"x": torch.ones(1, C, 1, 1)}, "x: expected more than one value per channel"),
    ({"x": torch.ones(1, C, 1)}, r"x: expected shape \[N, C, H, W\]"),
    ({"activation": "tanh"}, "activation: expected None or one of"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_arguments(wrong, message):
    call = {"x": torch.ones(2, C, 2, 2), "weight_pw": torch.ones(9, C, 1, 1)}
    call |= wrong | {"norm": ops.BatchNorm(**wrong.get("norm", {}))}
    with pytest.raises(ValueError, match=message):
        ops.pointwise_conv2d_batch_norm(**call)


def test_wrong_arguments_compiled_whole():
    torch.compiler.reset()

    def model(x, weight):
        return ops.pointwise_conv2d_batch_norm(x, weight, ops.BatchNorm(), activation="tanh") + 1

    with pytest.raises(ValueError, match="activation: expected None or one of"):
        torch.compile(model, backend="eager", fullgraph=True)(
            torch.ones(2, C, 2, 2), torch.ones(9, C, 1, 1)
        )


def test_modules_that_do_not_fit():
    with pytest.raises(ValueError, match="norm: expected a BatchNorm2d, got SyncBatchNorm"):
        ops.BatchNorm.of(torch.nn.SyncBatchNorm(C))
    with pytest.raises(ValueError, match="norm: expected one in training mode"):
        ops.BatchNorm.of(torch.nn.BatchNorm2d(C).eval())


def test_no_images():
    y = ops.pointwise_conv2d_batch_norm(
        torch.empty(0, C, 2, 2), torch.ones(9, C, 1, 1), ops.BatchNorm()
    )
    assert y.shape == F.batch_norm(torch.empty(0, 9, 2, 2), None, None, training=True).shape
