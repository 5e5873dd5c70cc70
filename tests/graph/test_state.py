"""Somebody else's model: copied, left as it was, and its random numbers drawn again."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sepconv
from sepconv.graph.state import check_copyable, copied, seed_generators, untouched


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held


class Head(nn.Module):
    """A convolution, and something that it holds."""

    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.conv, self.held = nn.Conv2d(8, 8, 3), held

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def with_lock_on_the_convolution() -> nn.Module:
    head = Head()
    head.conv.lock = threading.Lock()
    return head


WAYS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a lock": (lambda: Head(threading.Lock()), r"head\.held: _thread\.lock "),
    "in a list in a dict": (
        lambda: Head({"a": [1, threading.Lock()]}),
        r"head\.held\['a'\]\[1\]: _thread\.lock ",
    ),
    "in an object": (lambda: Head(Holder(threading.Lock())), r"head\.held\.held: _thread\.lock "),
    "a generator of Python's": (lambda: Head(i for i in "abc"), r"head\.held: generator "),
    "on the convolution": (with_lock_on_the_convolution, r"head\.conv\.lock: _thread\.lock "),
}


@pytest.mark.parametrize("what", WAYS)
def test_what_cannot_be_copied_is_named_with_the_way_out(what: str) -> None:
    head, message = WAYS[what]
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
    model.add_module("head", head())
    message = f"got {message}.*inplace=True"
    for action in (sepconv.convert, copied, check_copyable, sepconv.fuse):
        with pytest.raises(ValueError, match=message):
            action(model.eval())
    assert sepconv.convert(model, rank=1, dryrun=True).converted
    x = torch.randn(2, 8, 9, 9)
    expected = model(x)
    assert sepconv.convert(model, rank="full", inplace=True) is model
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_an_open_file_is_named(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        model = nn.Sequential(Head(file))
        with pytest.raises(ValueError, match=r"got 0\.held: _io\.TextIOWrapper .*inplace=True"):
            sepconv.convert(model, calibration=iter(int, 1))  # before any batch is read
        sepconv.convert(model, rank=1, inplace=True)
    assert type(model[0].conv) is sepconv.nn.SeparableConv2d


def test_a_loop_of_references_ends() -> None:
    model = Head(Holder(threading.Lock()))
    model.held.back = model.held
    with pytest.raises(ValueError, match=r"got held\.held: _thread\.lock"):
        copied(model)


class Draws(nn.Module):
    """Draws from every generator there is."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(1)
        self.several = [random.Random(2), np.random.default_rng(3), np.random.RandomState(4)]

    def forward(self) -> list[float]:
        python, numpy, legacy = self.several
        drawn = [torch.rand(()), torch.rand((), generator=self.own)]
        return [
            *map(float, drawn),
            random.random(),
            float(np.random.rand()),
            python.random(),
            float(numpy.random()),
            float(legacy.rand()),
        ]


def test_random_numbers_are_drawn_again_and_the_generators_put_back() -> None:
    model = Draws()
    with untouched(model):
        following = model(), model()
    with untouched(model):
        seed_generators(model, 7)
        first = model()
        other = model()
        seed_generators(model, 7)
        assert model() == first
        seed_generators(model, 8 + 2**40)  # any int will do
        assert not set(model()) & set(first)
    assert not set(first) & set(other)
    assert (model(), model()) == following


def test_a_buffer_made_in_inference_mode_is_put_back() -> None:
    model = nn.BatchNorm1d(2)
    with torch.inference_mode():
        model.register_buffer("seen", torch.zeros(1))
    with untouched(model), torch.inference_mode():
        model.seen += 1
        model(torch.randn(4, 2))
    assert model.seen.tolist() == [0.0]
    assert model.running_mean.tolist() == [0.0, 0.0]
