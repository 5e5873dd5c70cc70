"""The chain of packed convolutions: the same numbers as layer by layer, NaN and hooks included."""

import copy

import pytest
import torch
from mobilenet.randomised import difference, images, randomise_norms
from mobilenet.test_folding import unfused
from torch import nn

from sepconv import mobilenet
from sepconv.ops import onednn
from sepconv.ops.onednn import Layer, PackedChain, PackedConv2d

pytestmark = pytest.mark.skipif(
    onednn._OPERATORS is None, reason="needs a torch with oneDNN's operators"
)


def network(**options):
    torch.manual_seed(0)
    net = mobilenet.mobilenet_v1(0.25, 32, num_classes=5, **options)
    return randomise_norms(net).eval()


def chained(net, x):
    return net._chain(x)[0] is not None


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("padding", ["symmetric", "same", "keras"])
@pytest.mark.parametrize("body", ["separable", "conv", "shallow"])
def test_same_as_layer_by_layer(activation, padding, body):
    net = network(activation=activation, padding=padding, body=body)
    for size in (32, 45):
        assert chained(net, images(3, size))
        assert difference(net(images(3, size)), unfused(net, images(3, size))) < 1e-5


def test_head_convolution_is_part_of_it():
    net = network(head_channels=48)
    assert len(net._chain(images())[0]._layers) == 28
    assert difference(net(images()), unfused(net, images())) < 1e-5


@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize("indices", [None, 2, (3, 0), (1,), (-1, 1)])
def test_intermediate_maps(indices, only):
    net = network(head_channels=48)
    assert chained(net, images())
    got = net.forward_intermediates(images(), indices, only)
    handle = net.blocks.register_forward_hook(lambda *_: None)
    assert not chained(net, images())
    want = net.forward_intermediates(images(), indices, only)
    handle.remove()
    if not only:
        assert difference(got[0], want[0]) < 1e-5
        got, want = got[1], want[1]
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert difference(a, b) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_batches_in_parts(monkeypatch, count):
    net = network()
    want = net(images(count))
    largest = 8 * 16 * 16  # values of the first layer's result, per image
    monkeypatch.setattr(onednn, "_CHUNK_BYTES", 3 * 4 * 2 * largest)
    sizes = []
    run = PackedChain._run
    monkeypatch.setattr(PackedChain, "_run", lambda *args: sizes.append(len(args[1])) or run(*args))
    assert difference(net(images(count)), want) < 1e-6
    assert sum(sizes) == count
    assert max(sizes) <= 3
    assert len(set(sizes)) <= 2


# ---- NaN


def nan_sets(net, x):
    return net(x).isnan(), unfused(net, x).isnan()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_bad_pixels(bad, activation):
    net = network(activation=activation)
    x = images(3)
    x[1, 2, 5, 7] = bad
    got, want = nan_sets(net, x)
    assert torch.equal(got, want)
    assert not got[0].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["conv_stem", "blocks.2.1.conv_dw", "blocks.4.1.conv_pw"])
def test_bad_weights(bad, where):
    net = network(activation="relu")
    net.get_submodule(where).weight[0, 0, 0, 0] = bad
    got, want = nan_sets(net, images())
    assert torch.equal(got, want)
    assert want.any() or bad == float("inf")


def test_overflow_inside():
    net = network(activation="relu")
    for stage in net.blocks:
        for block in stage:
            block.bn2.weight.mul_(1e5)
    got, want = nan_sets(net, images())
    assert want.any()
    assert torch.equal(got, want)


def pointwise(weight):
    return PackedConv2d(torch.tensor(weight)[:, :, None, None], None, 1, 1)


def test_bounds_are_reached():
    convs = [pointwise([[1.0, -2.0], [0.5, 0.25]]), pointwise([[3.0, 4.0]])]
    bound = convs[0].bounds(torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert bound.tolist() == [5.0, 1.0]
    assert convs[1].bounds(bound).tolist() == [19.0]
    depthwise = PackedConv2d(
        torch.tensor([1.0, -2.0]).view(2, 1, 1, 1).expand(2, 1, 3, 3), None, 1, 2
    )
    assert depthwise.bounds(torch.tensor([1.0, 1.0], dtype=torch.float64)).tolist() == [9.0, 18.0]


@pytest.mark.parametrize(("scale", "fuses"), [(1e17, True), (1e20, False), (float("nan"), False)])
def test_only_bounded_chains_fuse(scale, fuses):
    layer = Layer(pointwise([[scale]]), lambda size: (0, 0, 0, 0), "relu")
    assert PackedChain([layer, layer])._stays_finite(torch.ones(1, 1, 1, 1)) is fuses
    clipped = Layer(pointwise([[scale]]), lambda size: (0, 0, 0, 0), "relu6")
    assert PackedChain([clipped, clipped])._stays_finite(torch.ones(1, 1, 1, 1)) is (scale == scale)


# ---- what must be seen


def calls_of(module, register, run):
    seen = []
    handle = register(lambda *_: seen.append(module))
    run()
    handle.remove()
    return len(seen)


@pytest.mark.parametrize(
    "name", ["conv_stem", "bn1", "blocks", "blocks.3", "blocks.3.1", "blocks.3.1.bn2"]
)
def test_hooks_are_called(name):
    net = network()
    net(images())
    module = net.get_submodule(name)
    assert calls_of(module, module.register_forward_hook, lambda: net(images())) == 1
    assert calls_of(module, module.register_forward_pre_hook, lambda: net(images())) == 1
    assert chained(net, images())


def test_global_hooks_are_called():
    net = network()
    net(images())
    register = nn.modules.module.register_module_forward_hook
    layers = sum(1 for m in net.modules() if not isinstance(m, nn.Identity))
    assert calls_of(net, register, lambda: net(images())) >= layers


def test_replaced_forward_runs():
    net = network()
    want = net(images())
    conv = net.blocks[1][0].conv_pw
    original = conv.forward
    conv.forward = lambda x: 2 * original(x)
    assert difference(net(images()), want) > 1e-3


def test_replaced_block_runs():
    net = network()
    net(images())
    net.blocks[3][2] = nn.Identity()
    assert difference(net(images()), unfused(net, images())) < 1e-5
    net.blocks[3].append(nn.ReLU())
    assert difference(net(images()), unfused(net, images())) < 1e-5


def test_copies_make_their_own():
    net = network()
    want = net(images())
    twin = copy.deepcopy(net)
    assert twin._chains._made is None
    twin.bn1.bias.add_(1.0)
    assert difference(twin(images()), want) > 1e-3
    assert torch.equal(net(images()), want)


def test_input_is_left_alone():
    net = network()
    x = images().contiguous(memory_format=torch.channels_last)
    before = x.clone()
    first = net(x)
    net(images(seed=1))
    assert torch.equal(x, before)
    assert torch.equal(net(x), first)


def test_few_shapes_are_kept():
    conv = PackedConv2d(torch.randn(8, 4, 3, 3), None, 1, 1)
    for size in range(4, 20):
        conv(torch.randn(1, 4, size, size), (1, 1, 1, 1))
    assert len(conv._packed) == onednn._MOST_SHAPES
