"""MobileNetV1 lowered by `sepconv.fuse`: every layer, every convention, the same numbers."""

import copy
from collections import Counter

import pytest
import torch
from mobilenet.randomised import difference, images, randomise_norms
from ran import ran
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sepconv
from sepconv import mobilenet
from sepconv.nn import FusedConv2d, FusedLinear, FusedSeparableConv2d
from sepconv.ops.backend import can_run_kernels


def network(**options):
    torch.manual_seed(0)
    net = mobilenet.mobilenet_v1(
        **{"width_mult": 0.25, "resolution": 32, "num_classes": 5} | options
    )
    return randomise_norms(net).eval()


def fuse(net, x=None):
    return sepconv.fuse(net, x, measure=False)


def parts(fused, x):
    return Counter(ran(fused, x))


def close(net, fused, x, bound=1e-5):
    with torch.no_grad():
        got, want = fused(x), net(x)
        if not isinstance(want, list):
            got, want = [got], [want]
        assert len(got) == len(want) > 0
        for a, b in zip(got, want, strict=True):
            assert difference(a, b) < bound


@pytest.mark.parametrize("given", [False, True], ids=["no input", "with an input"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "same", "activation": "relu6", "bias": True, "num_classes": 1001},  # TF-slim
        {"padding": "keras", "activation": "relu6", "dropout": 0.5, "head_channels": 48},
        {"padding": "same", "resolution": 96, "pool": 3},
        {"width_mult": 0.5, "stem_stride": 1, "in_channels": 1, "num_classes": 0},
        {"features_only": True, "out_indices": (1, 4), "padding": "keras"},
        {"body": "shallow"},
    ],
    ids=str,
)
def test_every_layer_is_fused(options, given):
    net = network(**options)
    sizes = [net.config.resolution + grown for grown in (0, 13)]
    first, other = (images(3, size, net.config.in_channels) for size in sizes)
    fused = fuse(net, first if given else None)
    assert parts(fused, first) == Counter(
        {
            FusedSeparableConv2d: len(net.config.blocks),
            FusedConv2d: 1 + bool(net.config.head_channels),
            FusedLinear: int(net.config.num_classes > 0),
        }
    )
    report = sepconv.report(fused)
    assert len(report.fused) == len(report.layers)
    assert report.trace_level == "graph"
    for x in (first, other):
        close(net, fused, x)
        with sepconv.backend("reference"):
            close(net, fused, x)
    exact = net.double()
    close(exact, fuse(exact), first.double(), 1e-12)


def test_what_a_backbone_does_not_call_is_left():
    net = network(features_only=True, out_indices=(0, 3))
    fused = fuse(net)
    layers = sepconv.report(fused).layers
    assert {layer.name for layer in layers if layer.status == "left"} == {
        f"blocks.4.{i}.conv_{kind}" for i in (0, 1) for kind in ("dw", "pw")
    }
    assert {layer.reason for layer in layers} == {"", "not called on one tensor"}
    close(net, fused, images())


@pytest.mark.parametrize("padding", ["symmetric", "same", "keras"])
def test_the_network_of_standard_convolutions(padding):
    net = network(body="conv", padding=padding)
    fused = fuse(net)
    assert parts(fused, images(3, 45)) == {FusedConv2d: 14, FusedLinear: 1}
    close(net, fused, images(3, 45))
    converted = sepconv.convert(net, rank=2)
    names = {layer.name for layer in sepconv.report(converted).converted}
    plain = [n for n, m in net.named_modules() if type(m) is nn.Conv2d and n != "conv_stem"]
    assert names == set(plain)
    assert len(names) == (13 if padding == "symmetric" else 9)  # those that do not stride
    close(converted.eval(), fuse(converted), images())


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_bad_pixels(bad, activation):
    net = network(activation=activation)
    x = images(3)
    x[1, 2, 5, 7] = bad
    with torch.no_grad():
        got, want = fuse(net)(x).isnan(), net(x).isnan()
    assert torch.equal(got, want)
    assert not got[0].any()


@pytest.mark.parametrize("where", ["conv_stem", "blocks.2.1.conv_dw", "blocks.4.1.conv_pw"])
@torch.no_grad()
def test_bad_weights(where):
    net = network()
    net.get_submodule(where).weight[0, 0, 0, 0] = float("nan")
    want = net(images()).isnan()
    assert want.any()
    assert torch.equal(fuse(net)(images()).isnan(), want)


@torch.no_grad()
def test_overflow_inside():
    net = network()
    for stage in net.blocks:
        for block in stage:
            block.bn2.weight.mul_(1e5)
    want = net(images()).isnan()
    assert want.any()
    assert torch.equal(fuse(net)(images()).isnan(), want)


@pytest.mark.parametrize("name", ["conv_stem", "bn1", "blocks.3", "blocks.3.1", "blocks.3.1.bn2"])
def test_hooks_are_called(name):
    net, calls = network(), []
    net.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    fused = fuse(net)
    calls.clear()
    close(net, fused, images())
    assert calls == [name] * 2  # of the network and of what was fused


def test_a_hook_sees_the_values_before_the_activation():
    net, seen = network(activation="relu6"), {}
    block = net.blocks[3][2]
    block.bn1.register_forward_hook(lambda _m, _i, y: seen.update(bn1=y))
    block.conv_pw.register_forward_pre_hook(lambda _m, args: seen.update(pw=args[0]))
    for model in (net, fuse(net)):
        seen.clear()
        with torch.no_grad():
            model(images())
        assert seen["bn1"].min() < 0, "the activation must not write into what was seen"
        assert torch.equal(seen["bn1"].clamp(0, 6), seen["pw"])


def test_global_hooks_are_called():
    net, seen = network(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        fused = fuse(net)
        seen.clear()
        fused(images())
    finally:
        handle.remove()
    assert seen.count(nn.BatchNorm2d) == 27


def test_a_replaced_forward_runs():
    net = network()
    conv = net.blocks[1][0].conv_pw
    original = conv.forward
    conv.forward = lambda x: 2 * original(x)
    fused = fuse(net)
    assert "own forward" in {layer.reason for layer in sepconv.report(fused).layers}
    close(net, fused, images())


@torch.no_grad()
def test_replaced_and_parametrised_layers_are_used():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    net = network()
    before = net(images())
    net.blocks[3][2] = nn.Identity()
    net.blocks[3].append(nn.ReLU())
    nn.utils.parametrize.register_parametrization(net.blocks[1][0].conv_pw, "weight", Doubled())
    assert difference(net(images()), before) > 1e-3
    close(net, fuse(net), images())


def test_sync_batchnorm_is_folded():
    net = network()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)).eval()
    fused = fuse(converted)
    assert parts(fused, images())[FusedSeparableConv2d] == 13
    close(net, fused, images())


def test_input_is_left_alone():
    fused = fuse(network())
    x = images().contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        first = fused(x)
        fused(images(seed=1))
        assert torch.equal(x, before)
        assert torch.equal(fused(x), first)


class Ops(TorchDispatchMode):
    """Counts the operators of sepconv."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sepconv":
            self.seen[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_a_fused_block_is_one_kernel(padding):
    """On a GPU, or through the interpreter."""
    pytest.importorskip("triton", reason="needs Triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not can_run_kernels(torch.empty(0, device=device)):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    stages = (((8, 1),), ((16, 2),))
    torch.manual_seed(0)
    config = mobilenet.MobileNetV1Config(8, stages, resolution=8, num_classes=5, padding=padding)
    net = randomise_norms(mobilenet.MobileNetV1(config)).eval().to(device)
    fused, x = fuse(net), images(2, 9).to(device)
    with sepconv.backend("triton"), torch.no_grad(), Ops() as ops:
        got = fused(x)
    assert ops.seen == {"separable_conv2d": 2}
    with sepconv.backend("reference"), torch.no_grad():
        assert difference(got, net(x)) < 1e-5
