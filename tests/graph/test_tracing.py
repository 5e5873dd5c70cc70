"""A graph stands for a forward only where the code would do the same again."""

import logging
import random
import sys
import threading
import time
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sepconv.graph.tracing import trace

LOCK = threading.Lock()
COUNTS = iter(range(10**6))
Pair = namedtuple("Pair", "a b")


class Net(nn.Module):
    """A convolution in code of some kind."""

    def __init__(self, code: Callable[["Net", Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.code = nn.Conv2d(4, 4, 3, padding=1), code
        self.calls, self.seen, self.scale = 0, [], torch.ones(1)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


@dataclass
class Unknown(OrderedDict):
    """A container that pytree does not know."""

    y: Any = None

    def __post_init__(self) -> None:
        self["y"] = self.y


@contextmanager
def own_context():
    yield


def in_context(enter: Callable[[], Any]) -> Callable[[Net, Tensor], Any]:
    def code(net: Net, x: Tensor) -> Any:
        with enter():
            return net.conv(x)

    return code


def swallows(net: Net, x: Tensor) -> Any:
    try:
        return net.conv(x) if x.sum() > 0 else x
    except Exception:
        return x


def matches(net: Net, x: Tensor) -> Any:
    match x:
        case Tensor():
            return net.conv(x)
    return x


def writes(name: str, value: Callable[[Net, Tensor], Any]) -> Callable[[Net, Tensor], Any]:
    def code(net: Net, x: Tensor) -> Any:
        setattr(net, name, value(net, x))
        return net.conv(x)

    return code


class Decorated(Net):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return self.conv(x)


REFUSED = {
    "asks for the type of a value": [
        lambda net, x: net.conv(x) if isinstance(x, Tensor) else x,
        lambda net, x: net.conv(x) if torch.is_tensor(net.conv(x)) else x,
        lambda net, x: net.conv(x) if x.__class__ is Tensor else x,
        matches,
    ],
    "asks for the truth of a value": [
        lambda net, x: net.conv(x) if x.sum() > 0 else x,
        lambda net, x: net.conv(x) if x.shape[0] == 1 else x,
        swallows,
    ],
    "asks for the length of a value": [lambda net, x: net.conv(x) * len(x)],
    "iterates over a value": [lambda net, x: torch.stack([net.conv(image) for image in x])],
    "asks whether a value has .tensors": [
        lambda net, x: net.conv(x.tensors if hasattr(x, "tensors") else x)
    ],
    "enters a context manager": [
        in_context(torch.no_grad),
        in_context(lambda: torch.autocast("cpu", enabled=False)),
        in_context(lambda: torch.device("cpu")),
        in_context(lambda: LOCK),
        in_context(own_context),
        Decorated,
    ],
    "draws random numbers": [
        lambda net, x: net.conv(x) + torch.randn(1),
        lambda net, x: net.conv(x) * random.random(),
        lambda net, x: net.conv(x) * np.random.rand(),
        lambda net, x: net.conv(x) + torch.randn_like(x),
        lambda net, x: net.conv(x) + x.new_empty(x.shape).uniform_(),
    ],
    "does not do the same twice": [
        lambda net, x: net.conv(x) * next(COUNTS),
        lambda net, x: net.conv(x) * time.perf_counter(),
        lambda net, x: net.conv(x) * (net.seen.append(1) or len(net.seen)),
    ],
    "writes to self.calls": [
        writes("calls", lambda net, x: net.calls + 1),
        writes("calls", lambda net, x: x),
    ],
    "writes to self.scale": [writes("scale", lambda net, x: net.scale.type_as(x))],
    "writes to self.mean": [writes("mean", lambda net, x: net.mean + 1)],
    "asks is_grad_enabled()": [lambda net, x: net.conv(x) if torch.is_grad_enabled() else x],
    "makes a Unknown": [lambda net, x: Unknown(net.conv(x))],
}


def state(net: nn.Module) -> dict[str, Any]:
    return {key: copied(value) for key, value in vars(net).items()}


def copied(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list) else value


@pytest.mark.parametrize(
    ("why", "code"), [(why, code) for why, codes in REFUSED.items() for code in codes]
)
def test_refused_as_root_and_as_part(why: str, code: Any) -> None:
    net = (code(None) if code is Decorated else Net(code)).eval()
    around = nn.Sequential(nn.Conv2d(4, 4, 1), net, nn.ReLU()).eval()
    before, drawn, profile = state(net), torch.get_rng_state(), sys.getprofile()
    alone = trace(net)
    assert (alone.level, alone.graph, alone.why) == ("modules", None, why)
    inside = trace(around)
    assert (inside.level, inside.leaves, inside.why) == ("leaves", {"1": why}, why)
    assert inside.graph is not None
    assert [n.target for n in inside.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    assert state(net) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert sys.getprofile() is profile


def logged(net: Net, x: Tensor) -> Tensor:
    logging.getLogger("net").debug("called")  # takes a lock of the standard library's
    return net.conv(x)


TAKEN = [
    lambda net, x: net.conv(x) + torch.tensor([1.0]),
    lambda net, x: net.conv(x).flatten(1) @ torch.eye(100),
    lambda net, x: [net.conv(x), {"a": x}, Pair(x, x)],
    lambda net, x: OrderedDict(a=net.conv(x), b=[x, 1]),
    lambda net, x: net.conv(x) if net.scale is not None else x,
    lambda net, x: x if isinstance(net.conv, nn.Conv1d) else net.conv(x),
    lambda net, x: F.dropout(net.conv(x), training=net.training),
    lambda net, x: torch.cat([net.conv(x), x.new_zeros(x.shape)], 1),
    logged,
]


@pytest.mark.parametrize("code", TAKEN)
def test_taken(code: Callable[[Net, Tensor], Any]) -> None:
    net, x = Net(code).eval(), torch.randn(2, 4, 5, 5)
    traced = trace(net)
    assert traced.level == "graph", traced.why
    vars(net).update(traced.constants)
    got, expected = fx.GraphModule(net, traced.graph)(x), net(x)
    assert type(got) is type(expected)
    torch.testing.assert_close(got, expected)


def test_arguments_are_placed_or_fixed() -> None:
    class Many(nn.Module):
        def forward(self, x, flag=False, other=None, *rest, scale=2.0, **more):
            y = x * scale if flag else x
            return y if other is None else y + other

    def placed(**given: Any) -> tuple[list[str], dict[str, Any]]:
        traced = trace(Many(), given)
        assert traced.graph is not None
        return [n.name for n in traced.graph.nodes if n.op == "placeholder"], dict(traced.fixed)

    x = torch.zeros(1)
    assert placed(x=x) == (["x"], {"flag": False, "other": None, "scale": 2.0})
    assert placed(x=x, other=x, flag=True) == (["x", "other"], {"flag": True, "scale": 2.0})
    assert trace(Many(), {"x": x, "rest": (x,)}).why == "takes any number of arguments"
    assert trace(Many()).level == "graph"
