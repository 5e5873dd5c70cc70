"""One look at the input for a whole fused network: what it may and may not change."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import sepconv
from sepconv.nn import FusedGate
from sepconv.nn.promise import LARGEST_INPUT, InputCheck, Promise

NAN, INF = float("nan"), float("inf")


def block(channels: int, activation: nn.Module) -> nn.Sequential:
    wide = 2 * channels
    return nn.Sequential(
        nn.Conv2d(channels, wide, 1),
        nn.BatchNorm2d(wide),
        activation,
        nn.Conv2d(wide, wide, 3, padding=1, groups=wide),
        nn.BatchNorm2d(wide),
        activation,
        nn.Conv2d(wide, channels, 1),
    )


class Net(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), activation)
        self.block = block(4, activation)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())
        self.last = nn.Sequential(nn.Conv2d(4, 8, 1), activation, nn.Conv2d(8, 5, 1), activation)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        return self.last(x * self.gate(x))


@pytest.fixture(params=[nn.ReLU, nn.ReLU6, nn.SiLU])
def net(request) -> nn.Module:
    torch.manual_seed(0)
    return Net(request.param()).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(1))


def promises(fused: nn.Module, x: Tensor) -> set[Promise]:
    """What the modules of one forward were told."""
    told: set[Promise] = set()
    check = next(m for m in fused.modules() if isinstance(m, InputCheck))
    handle = check.register_forward_hook(lambda module, args, result: told.update(result))
    with torch.no_grad():
        fused(x)
    handle.remove()
    return told


def same(fused: nn.Module, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_all_of_a_plain_network_is_promised(net):
    fused = sepconv.fuse(net)
    assert promises(fused, images()) == {Promise.FINITE, Promise.PACKED}
    check = next(m for m in fused.modules() if isinstance(m, InputCheck))
    assert len(check.bounded) == len(check.steps)
    same(fused, net, images())


@pytest.mark.parametrize("value", [NAN, INF, -INF, 2 * LARGEST_INPUT])
def test_values_out_of_range_come_through(net, value):
    fused = sepconv.fuse(net)
    same(fused, net, images())
    x = images()
    x[0, 1, 2, 3] = value
    assert promises(fused, x) == {Promise.PACKED}
    same(fused, net, x)
    if value != value:
        assert fused(x)[0].isnan().any()
    same(fused, net, images())


def test_a_weight_of_nan_loaded_later_comes_through(net):
    fused = sepconv.fuse(net)
    same(fused, net, images())
    with torch.no_grad():
        net.block[0].weight[1, 0] = NAN
    fused.load_state_dict(sepconv.fuse(net).state_dict())
    assert promises(fused, images()) == {Promise.PACKED}
    same(fused, net, images())


def test_loaded_weights_are_packed_again(net):
    fused = sepconv.fuse(net)
    same(fused, net, images())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
    fused.load_state_dict(sepconv.fuse(net).state_dict())
    assert promises(fused, images()) == {Promise.FINITE, Promise.PACKED}
    same(fused, net, images())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_look_at_their_own_weights(net, copied):
    fused = sepconv.fuse(net)
    same(fused, net, images())
    other = copied(fused)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    same(other, net, images())
    assert len(list(other.parameters())) == len(list(fused.parameters()))


def test_weights_that_may_overflow_are_not_promised():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU()).eval()
    with torch.no_grad():
        net[2].weight.fill_(-1e36)
        net[0].weight.fill_(1)
    fused = sepconv.fuse(net)
    check = next(m for m in fused.modules() if isinstance(m, InputCheck))
    assert check.bounded == (0,)
    same(fused, net, 100 * images().abs())


def test_autograd_and_other_dtypes_are_not_promised(net):
    fused = sepconv.fuse(net)
    x = images().requires_grad_()
    fused(x).sum().backward()
    expected = images().requires_grad_()
    net(expected).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)
    assert promises(fused.double(), images().double()) == {Promise.NONE}
    same(fused, net.double(), images().double())


def test_nothing_is_promised_behind_unknown_code():
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp()

    torch.manual_seed(0)
    convs = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(4)]
    net = nn.Sequential(convs[0], convs[1], Doubles(), convs[2], convs[3]).eval()
    fused = sepconv.fuse(net)
    check = next(m for m in fused.modules() if isinstance(m, InputCheck))
    assert len(check.steps) == 2
    same(fused, net, 1e3 * images())


class Gated(nn.Module):
    """Uses what it gates in another way too, as told."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        gate = self.squeeze(y)
        if self.how == "not":
            return self.last(y * gate)
        if self.how == "later":
            return self.last(y * gate) + y
        if self.how == "through a view":
            view = y.flatten(2)
            return self.last(gate * y) + view.reshape(y.shape)
        if self.how == "twice":
            return self.last(y * gate) + y * gate
        if self.how == "with itself":
            return self.last(y * y)
        if self.how == "the input":
            return self.last(x[:, :1] * gate) + x[:, :1]
        return self.last(y * y.mean(1, keepdim=True))


WAYS = ["not", "later", "through a view", "twice", "with itself", "the input", "by pixels"]


@pytest.mark.parametrize("how", WAYS)
def test_a_gate_writes_only_over_what_nobody_reads(how):
    torch.manual_seed(0)
    net = Gated(how).eval()
    fused = sepconv.fuse(net)
    gates = [m for m in fused.modules() if isinstance(m, FusedGate)]
    assert len(gates) == (how in ("not", "by pixels"))
    x = images()
    before = x.clone()
    same(fused, net, x)
    assert torch.equal(x, before)
    leaves = [images().requires_grad_() for _ in range(2)]
    for model, leaf in zip((net, fused), leaves, strict=True):
        model(leaf).square().sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
