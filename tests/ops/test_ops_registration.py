"""The registered operators: torch's own checks, compilation, export, flop formulas."""

import pytest
import torch
from ops.calls import (
    DEVICE,
    OPS,
    SIDES,
    arguments,
    public,
    registered,
    registered_arguments,
    tensors_of,
)
from torch.utils.flop_counter import FlopCounterMode

from sepconv import register_flops
from sepconv.ops.kernel_modules import kernel_module

GEOMETRY = ((2, 1), SIDES, (1, 2))


def _opcheck(op, args):
    results = torch.library.opcheck(getattr(torch.ops.sepconv, op).default, args)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, channels_last, requires_grad, autocast, without_kernels):
    call = arguments(
        op,
        dtype=torch.float32,
        channels_last=channels_last,
        requires_grad=requires_grad,
        activation="relu" if channels_last else "silu",
        device=DEVICE,
    )
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        _opcheck(op, registered_arguments(call))


@pytest.mark.parametrize("op", OPS)
def test_opcheck_with_kernels(op):
    call = arguments(op, dtype=torch.float32, channels_last=True, requires_grad=True, device=DEVICE)
    _opcheck(op, registered_arguments(call))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_opcheck_of_the_backward_operators(channels_last):
    call = arguments("depthwise_conv2d", channels_last=channels_last, device=DEVICE)
    x, weight = (call[name].float().requires_grad_() for name in ("x", "weight_dw"))
    dy = torch.randn(2, 6, 3, 6, device=DEVICE, requires_grad=True)
    _opcheck("depthwise_conv2d_backward_input", (dy, weight, x.shape, *GEOMETRY, channels_last))
    _opcheck("depthwise_conv2d_backward_weight", (dy, x, weight.shape, *GEOMETRY))


@pytest.mark.parametrize("kernels", [False, True], ids=["aten", "kernels"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_opcheck_of_activation_gradients(channels_last, requires_grad, kernels, request):
    if not kernels:
        request.getfixturevalue("without_kernels")
    dy = torch.randn(2, 7, 3, 6, device=DEVICE).transpose(1, 3).requires_grad_(requires_grad)
    z = _images(channels_last, 2, 6, 3, 7).requires_grad_(requires_grad)
    for activation, bias in (("relu", True), ("gelu", True), ("silu", False)):
        _opcheck("activation_backward", (dy, z, activation, bias))
    _opcheck("channel_sum", (dy,))


class Block(torch.nn.Module):
    """A separable convolution between operations that a compiler would fuse and reorder."""

    def __init__(self, run, channels_last):
        super().__init__()
        self.run = run
        call = arguments("separable_conv2d", dtype=torch.float32, device=DEVICE)
        for name, tensor in tensors_of(call).items():
            if name not in ("x", "residual"):
                setattr(self, name, torch.nn.Parameter(tensor))
        self.channels_last = channels_last

    def forward(self, x):
        call = {
            "x": x.relu() if self.channels_last else x.transpose(2, 3).relu(),
            "weight_dw": self.weight_dw,
            "weight_pw": self.weight_pw,
            "bias_dw": self.bias_dw,
            "bias_pw": self.bias_pw,
            "stride": (2, 1),
            "padding": ((1, 0), (2, 1)),
            "dilation": (1, 2),
            "activation_mid": "relu6",
            "activation": "silu",
            "residual": None,
        }
        y = self.run("separable_conv2d", call)
        return y, y.sigmoid() + 1


def _images(channels_last, *shape):
    x = torch.randn(shape, device=DEVICE)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def _assert_same(compiled, eager, x):
    results = []
    for model in (compiled, eager):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y, z = model(leaf)
        parameters = list(eager.parameters())
        results.append((y, z, torch.autograd.grad((y * z).sum(), (leaf, *parameters))))
    for ours, wanted in zip(results[0][:2], results[1][:2], strict=True):
        assert ours.stride() == wanted.stride()
        torch.testing.assert_close(ours, wanted)
    for ours, wanted in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("run", [public, registered])
def test_compiles_whole(run, channels_last, without_kernels):
    torch.compiler.reset()
    block = Block(run, channels_last)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=False)
    _assert_same(compiled, block, _images(channels_last, 2, 3, 6, 5))


@pytest.mark.parametrize("run", [public, registered])
def test_compiles_whole_with_dynamic_shapes(run, without_kernels):
    torch.compiler.reset()
    block = Block(run, True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    _assert_same(compiled, block, _images(True, 2, 3, 6, 5))
    with torch.compiler.set_stance("fail_on_recompile"):
        _assert_same(compiled, block, _images(True, 4, 3, 7, 9))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_inductor_keeps_the_strides(channels_last, without_kernels):
    torch.compiler.reset()
    block = Block(registered, channels_last)
    x = _images(channels_last, 2, 3, 6, 5)
    with torch.no_grad():
        for ours, wanted in zip(torch.compile(block, fullgraph=True)(x), block(x), strict=True):
            assert ours.stride() == wanted.stride()
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("run", [public, registered])
def test_exports(run, without_kernels):
    block = Block(run, True)
    batch, height = torch.export.Dim("batch"), torch.export.Dim("height", min=4)
    program = torch.export.export(
        block, (_images(True, 2, 3, 6, 5),), dynamic_shapes={"x": {0: batch, 2: height}}
    )
    x = _images(True, 3, 3, 8, 5)
    for ours, wanted in zip(program.module()(x), block(x), strict=True):
        torch.testing.assert_close(ours, wanted)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    # ATen for the CPU path, which any runtime knows; one node for the operator
    assert ("sepconv.separable_conv2d.default" in called) == (run is registered)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, while it packs
def test_compiled_ahead_of_time(tmp_path, without_kernels):
    """AOTInductor, loaded into a Python process that has the operators."""
    block, x = Block(registered, True).eval(), _images(True, 2, 3, 6, 5)
    with torch.no_grad():
        program = torch.export.export(block, (x,))
        path = str(tmp_path / "block.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        for ours, wanted in zip(torch._inductor.aoti_load_package(path)(x), block(x), strict=True):
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("op", OPS)
def test_flops_are_two_for_each_multiply_add(op, without_kernels):
    register_flops()
    register_flops()  # a second time changes nothing
    call = arguments(op, requires_grad=True)
    y = public(op, call)
    n, k, p, q = y.shape
    depthwise = n * 6 * p * q * 3 * 2
    macs = {
        "depthwise_conv2d": depthwise,
        "pointwise_conv2d": n * k * p * q * 3,
        "separable_conv2d": depthwise + n * k * p * q * 6,
    }
    for run in (public, registered):
        with FlopCounterMode(display=False) as counter:
            y = run(op, call)
        assert counter.get_total_flops() == 2 * macs[op]

    # Each gradient takes the multiply-adds of its forward; the separable backward computes the
    # depthwise half again.
    with FlopCounterMode(display=False) as counter:
        y.backward(torch.ones_like(y))
    again = depthwise if op == "separable_conv2d" else 0
    assert counter.get_total_flops() == 2 * (2 * macs[op] + again)


def test_tf32_follows_the_convolution_setting(monkeypatch):
    """Both of torch's ways to set it: the flag of old, and precisions by backend or globally."""
    seen = []
    pointwise = kernel_module("pointwise")
    launch = pointwise.pointwise_fwd

    def spy(*args, allow_tf32, **kwargs):
        seen.append(allow_tf32)
        return launch(*args, allow_tf32=allow_tf32, **kwargs)

    monkeypatch.setattr(pointwise, "pointwise_fwd", spy)
    call = arguments("pointwise_conv2d", dtype=torch.float32, device=DEVICE)
    backends = torch.backends
    for setting, value in (
        ((backends.cudnn, "allow_tf32"), False),
        ((backends.cudnn, "allow_tf32"), True),
        ((backends.cudnn.conv, "fp32_precision"), "ieee"),
        ((backends.cudnn.conv, "fp32_precision"), "tf32"),
    ):
        before = backends.cudnn.conv.fp32_precision
        try:
            setattr(*setting, value)
            registered("pointwise_conv2d", call)
        finally:
            backends.cudnn.conv.fp32_precision = before
    assert seen == [False, True, False, True]
