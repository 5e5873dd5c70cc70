"""Code that needs its convolutions dense, or their results contiguous, is found by running it."""

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sepconv
from sepconv.nn import SeparableConv2d

X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        return self.after(self.c(self.b(self.a(x))))

    def after(self, y: Tensor) -> Any:
        return y


class AsksForItsClass(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.c(self.b(y) if isinstance(self.b, nn.Conv2d) else y)


class OtherStructure(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.c(self.b(self.a(x)))
        return y if type(self.b) is nn.Conv2d else [y]


class Raises(Net):
    def forward(self, x: Tensor) -> Any:
        assert type(self.b) is nn.Conv2d, "unknown layer"
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize("rank", [1, "full"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [AsksForItsClass, OtherStructure, Raises])
def test_layers_whose_class_code_asks_for(kind, inplace, rank):
    net = kind().eval()
    with torch.no_grad():
        expected = net(X)
    with pytest.warns(UserWarning, match="something else where these layers are separable.* b;"):
        made = sepconv.convert(net, X, rank=rank, inplace=inplace)
    assert {x.name: x.reason for x in sepconv.report(made).layers} == {
        "a": "",
        "b": "code around it",
        "c": "",
    }
    assert isinstance(made.a, SeparableConv2d)
    assert type(made.b) is nn.Conv2d
    if rank == "full":
        with torch.no_grad():
            torch.testing.assert_close(made(X), expected, rtol=1e-4, atol=1e-5)


class ThroughNumpy(Net):
    """What no recorder of torch's functions sees."""

    def after(self, y: Tensor) -> Any:
        return torch.from_numpy(y.detach().numpy().ravel(order="K").copy()).view(y.shape)


class Strided(Net):
    def after(self, y: Tensor) -> Any:
        n, c, h, w = y.shape
        return y.as_strided((n, c, h // 2, 2 * w), (c * h * w, h * w, 2 * w, 1))


class StridedByFunction(Net):
    def after(self, y: Tensor) -> Any:
        n, c, h, w = y.shape
        return torch.as_strided(y, (n, c, h // 2, 2 * w), (c * h * w, h * w, 2 * w, 1))


class AsksForLayout(Net):
    def after(self, y: Tensor) -> Any:
        if not y.is_contiguous():
            raise ValueError("expected a contiguous tensor")
        return y * 2


class Asserts(Net):
    def after(self, y: Tensor) -> Any:
        assert y.is_contiguous()
        return y * 2


class Complex(Net):
    def after(self, y: Tensor) -> Any:
        n, c, h, w = y.shape
        return torch.view_as_real(torch.view_as_complex(y.reshape(n, c, h, w // 2, 2)) * 1j)


class Stride(Net):
    def after(self, y: Tensor) -> Any:
        return y * y.stride(1)


KINDS = [ThroughNumpy, Strided, StridedByFunction, AsksForLayout, Asserts, Complex, Stride]


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_in_memory(kind, given):
    if kind is ThroughNumpy and not given:
        pytest.skip("numpy is out of sight without a run")
    net = kind().eval()
    with torch.no_grad():
        expected = net(X)
        made = sepconv.convert(net, X if given else None, rank="full")
        torch.testing.assert_close(made(X), expected, rtol=1e-4, atol=1e-4)
        fused = sepconv.fuse(net, X if given else None, measure=False)
        torch.testing.assert_close(fused(X), expected, rtol=1e-4, atol=1e-4)
    assert all(not m.keeps_channels_last for m in made.modules() if isinstance(m, SeparableConv2d))
    assert len(sepconv.report(made).converted) == 3


def test_models_that_cannot_be_copied_are_converted_in_place_untried():
    net = Net().eval()
    net.lock = threading.Lock()
    with torch.no_grad():
        expected = net(X)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "convert: the model did not get faster")
            made = sepconv.convert(net, X, rank="full", inplace=True)
        assert made is net
        torch.testing.assert_close(made(X), expected, rtol=1e-4, atol=1e-5)


def test_weights_are_back_afterwards():
    net = Net()
    before = [p.detach().clone() for p in net.parameters()]
    sepconv.convert(net, X, rank=1)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(p.is_contiguous() for p in net.parameters())
