"""A plan by time is tried on the whole model, corrected twice at most, and never taken on trust."""

import warnings
from typing import Any

import pytest
import torch
from conversion.compare import Counts, untouched
from torch import nn

import sepconv
from sepconv.conversion import confirm
from sepconv.factorize import Form
from sepconv.graph import ConvSpec
from sepconv.nn import FusedConv2d, FusedSeparableConv2d
from sepconv.reports.latency import LatencyTable

X = torch.ones(1, 8, 12, 12)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(4)]
    return nn.Sequential(*layers).eval()


def ranks(model: nn.Module) -> list[int]:
    return [layer.form.rank for layer in sepconv.report(model).layers if layer.form is not None]


class Clock:
    """Layers take 10 ms dense and 1 ms a rank; the whole model `factor` as much as its layers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
        self.factor, self.tried = factor, list[list[int]]()
        monkeypatch.setattr(LatencyTable, "seconds", self.layer)
        monkeypatch.setattr("sepconv.conversion.costs.take_turns", self.turns)

    @staticmethod
    def layer(_: LatencyTable, spec: ConvSpec, form: Form | None) -> float:
        return 10e-3 if form is None else 1e-3 * form.rank

    def turns(self, forms: dict[str, Any], *_: Any, **__: Any) -> dict[str, float]:
        return {name: self.whole(form.func) for name, form in forms.items()}

    def whole(self, model: nn.Module) -> float:
        """Of a fused model; what was not fused takes too long."""
        sets = [
            len(m.weight_dw) // 8 for m in model.modules() if isinstance(m, FusedSeparableConv2d)
        ]
        dense = sum(isinstance(m, FusedConv2d) for m in model.modules())
        if len(sets) + dense != 4:
            return 1e3
        if sets and self.tried[-1:] != [sorted(sets)]:  # short times are taken again
            self.tried.append(sorted(sets))
        return 10e-3 * dense + 1e-3 * self.factor * sum(sets)


def test_a_plan_that_holds_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = sepconv.convert(net(), X, budget=sepconv.Budget(latency=0.3))
    assert sum(ranks(small)) == 12  # of 4 x 10 ms
    report = sepconv.report(small)
    assert (report.latency_before, report.latency_after) == pytest.approx((0.04, 0.012))
    assert report.device.endswith(", fused")
    assert [sum(sets) for sets in clock.tried] == [12]


def test_a_plan_that_takes_longer_as_a_whole_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = sepconv.convert(net(), X, budget=sepconv.Budget(latency=0.3))
    assert [sum(sets) for sets in clock.tried] == [12, 6]
    assert sepconv.report(small).latency_after == pytest.approx(0.012)


def test_forms_that_are_then_slower_than_dense_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, 4.0)
    small = sepconv.convert(net(), X, budget=sepconv.Budget(latency=0.9))
    assert ranks(small)
    assert max(ranks(small)) < 10 / 4


def test_what_two_corrections_do_not_reach_is_warned_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch, 1.0)
    whole = clock.whole

    def longer(model: nn.Module) -> float:
        """The fewer filters, the longer each takes."""
        filters = sum(len(m.weight_dw) for m in model.modules() if hasattr(m, "weight_dw"))
        clock.factor = 30 / max(filters // 8, 1)
        return whole(model)

    monkeypatch.setattr(clock, "whole", longer)
    with pytest.warns(UserWarning, match=r"latency=0.3 was not reached: .* takes 0\.\d+ of"):
        sepconv.convert(net(), X, budget=sepconv.Budget(latency=0.3))
    assert len(clock.tried) <= 1 + confirm.ROUNDS


def test_a_budget_that_no_correction_reaches_is_warned_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Clock(monkeypatch, 9.0)
    with pytest.warns(UserWarning, match="latency=0.2 was not reached"):
        small = sepconv.convert(net(), X, budget=sepconv.Budget(latency=0.2))
    assert sum(ranks(small)) <= 8


def test_the_trial_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, 1.0)

    model, x = Counts(net()).train(), X.clone()
    with untouched(model):
        small = sepconv.convert(model, x, budget=sepconv.Budget(latency=0.5))
    assert small.calls == 0
    assert all(module.training for module in small.modules())
    assert torch.equal(x, X)


def test_a_model_that_cannot_be_copied_is_planned_by_its_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Converted in place, it cannot be tried; nor can `fuse` lower it."""
    clock = Clock(monkeypatch, 2.0)
    monkeypatch.setattr(clock, "whole", lambda model: 0.04)
    model = net()
    model.held = open(__file__)  # noqa: SIM115 - what no copy can have
    with model.held, pytest.warns(UserWarning, match="did not get faster"):
        small = sepconv.convert(model, X, budget=sepconv.Budget(latency=0.3), inplace=True)
    assert small is model
    assert sum(ranks(small)) == 12
