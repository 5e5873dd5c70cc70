"""Dense forms in the place of separable ones, where a measurement says so."""

import pytest
import torch
from fusion.test_fuse import close, dw, images, pw, settled
from torch import nn

import sepconv
from sepconv import Form
from sepconv.fusion import dense
from sepconv.nn import FusedConv2d, FusedSeparableConv2d, FusedTuckerConv2d


class Residual(nn.Module):
    """Two convolutions, one called twice, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x)))
        return torch.relu(self.again(self.again(y)) + x)


def converted(**options) -> nn.Module:
    torch.manual_seed(0)
    return sepconv.convert(settled(Residual()), images(), **options)


@pytest.fixture(params=[True, False])
def verdict(request, monkeypatch):
    """What every measurement says."""
    calls = []

    def says(*forms):
        for form in forms:
            form()
        calls.append(forms)
        return request.param

    monkeypatch.setattr(dense, "is_faster", says)
    monkeypatch.setattr("sepconv.fusion.fuse.MARGIN", float("inf"))
    return request.param, calls


@pytest.mark.parametrize("options", [{"rank": 3}, {"rank": Form(2, 4, 4)}])
def test_what_is_faster_runs(verdict, options):
    faster, calls = verdict
    model = converted(**options)
    fused = sepconv.fuse(model, images())
    close(fused(images()), model(images()))
    kinds = {type(m) for m in fused.modules() if "Fused" in type(m).__name__}
    separable = FusedTuckerConv2d if options["rank"] == Form(2, 4, 4) else FusedSeparableConv2d
    assert (FusedConv2d in kinds and separable not in kinds) == faster
    assert (separable in kinds) != faster
    layers = sepconv.report(fused).fused
    assert [layer.form for layer in layers] == ["dense" if faster else "separable"] * len(layers)
    assert len(calls) == 3, "of the four calls two are alike: shapes, weights, what is added"


def test_nothing_is_timed_without_being_asked(verdict):
    _, calls = verdict
    model = converted(rank=3)
    sepconv.fuse(model, images(), measure=False)
    sepconv.fuse(model)
    assert not calls


def test_what_stands_for_no_dense_convolution_is_not_timed(verdict):
    _, calls = verdict
    model = settled(nn.Sequential(dw(), nn.ReLU(), pw()))
    fused = sepconv.fuse(model, images())
    close(fused(images()), model(images()))
    assert not calls
    assert [layer.form for layer in sepconv.report(fused).fused] == ["separable"] * 2


def test_both_stages_of_a_pair_say_so(verdict):
    faster, _ = verdict
    model = settled(nn.Sequential(dw(), nn.BatchNorm2d(8), pw()))
    fused = sepconv.fuse(model, images())
    close(fused(images()), model(images()))
    form = "dense" if faster else "separable"
    assert [layer.form for layer in sepconv.report(fused).fused] == [form] * 2


@pytest.mark.usefixtures("verdict")
def test_another_answer_is_not_taken(monkeypatch):
    model = converted(rank=3)

    def wrong(module, channels):
        found = composed(module, channels)
        with torch.no_grad():
            found.weight.mul_(2)
        return found

    composed = dense.composed
    monkeypatch.setattr(dense, "composed", wrong)
    fused = sepconv.fuse(model, images())
    close(fused(images()), model(images()))
    assert {layer.form for layer in sepconv.report(fused).fused} == {"separable"}
    assert not sepconv.report(fused).left


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([{"dense": 0.5, "separable": 1.0}], True),  # long and clear
        ([{"dense": 1.0, "separable": 0.5}], False),
        ([{"dense": 0.9, "separable": 1.0}, {"dense": 1.1, "separable": 1.0}], False),
        ([{"dense": 1.1, "separable": 1.0}, {"dense": 0.9, "separable": 1.0}], True),
        ([{"dense": 1e-4, "separable": 1e-3}, {"dense": 2e-3, "separable": 1e-3}], False),
    ],
)
def test_one_clear_turn_is_enough_where_it_takes_long(monkeypatch, turns, expected):
    left = list(turns)
    monkeypatch.setattr(dense, "take_turns", lambda forms, rounds, **_: left.pop(0))
    assert dense.is_faster(int, int) is expected
    assert not left
