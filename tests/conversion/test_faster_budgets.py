"""Budgets of what measures faster: as near as it gets, by planted times."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conversion.compare import untouched
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sepconv
from sepconv import Form
from sepconv.conversion.costs import DENSE
from sepconv.conversion.plan import forms_if_faster
from sepconv.graph import ConvSpec
from sepconv.nn import SeparableConv2d
from sepconv.reports.latency import LatencyTable

pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")

X = torch.zeros(1, 8, 6, 6)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1)
    ).eval()


def forms(model: nn.Module) -> dict[str, Form]:
    return {name: m.form for name, m in model.named_modules() if isinstance(m, SeparableConv2d)}


def count(kind: str, model: nn.Module) -> int:
    if kind == "params":
        return sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(X)
    return counter.get_total_flops() // 2


def plant(
    monkeypatch: pytest.MonkeyPatch, faster: Callable[[int, Form], bool], slow: float = 3e-3
) -> list[tuple[int, Form | None]]:
    """Dense takes 2 ms, a form 1 or `slow`; `faster` is asked with the layer's out-channels."""
    asked: list[tuple[int, Form | None]] = []

    def seconds(table: LatencyTable, spec: ConvSpec, form: Form | None) -> float:
        out_channels = spec.weight_shape[0]
        asked.append((out_channels, form))
        if form is None:
            return 2e-3
        return 1e-3 if faster(out_channels, form) else slow

    monkeypatch.setattr(LatencyTable, "seconds", seconds)
    return asked


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("seconds", [2e-3, 3e-3])  # equally fast is not faster
def test_it_is_planned_again_with_what_is_faster(
    kind: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be planned is slow: the budget is reached with others, without a warning."""
    options: dict[str, Any] = {"budget": sepconv.Budget(**{kind: 0.5})}
    slow = set(forms(sepconv.convert(net(), X, **options)).values())
    plant(monkeypatch, lambda _, form: form not in slow, seconds)
    model = net()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "convert: only_if_faster")
        small = sepconv.convert(model, X, only_if_faster=True, **options)
    assert forms(small)
    assert not slow & set(forms(small).values())
    assert count(kind, small) <= 0.5 * count(kind, model)


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_out_of_reach_the_cheapest_that_is_faster_is_taken(
    kind: str, calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one layer nothing is faster, of the other ranks from 2 on."""
    plant(monkeypatch, lambda out_channels, form: out_channels == 16 and form.rank >= 2)
    model = net()
    options: dict[str, Any] = {"budget": sepconv.Budget(**{kind: 0.4}), "only_if_faster": True}
    if calibrated:
        options["calibration"] = [torch.randn(4, 8, 6, 6)]
        options["bottleneck"] = False
    with pytest.warns(UserWarning, match="only_if_faster") as caught:
        small = sepconv.convert(model, X, **options)
    assert forms(small) == {"0": Form(2)}
    (warning,) = [w for w in caught if "only_if_faster" in str(w.message)]
    reached = count(kind, small) / count(kind, model)
    assert str(warning.message) == (
        f"convert: only_if_faster: the layers that measure faster reach {kind}={reached:.4g} "
        "of the model, not 0.4 as asked"
    )
    assert warning.filename == __file__
    first, second = sepconv.report(small).layers
    assert (first.latency_before, first.latency_after) == (2e-3, 1e-3)
    assert second.reason == "not faster, 2 ms > 3 ms"


def test_where_nothing_is_faster_the_model_comes_back_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch, lambda *_: False)
    model = net()
    with untouched(model), pytest.warns(UserWarning, match="only_if_faster") as caught:
        same = sepconv.convert(model, X, budget=sepconv.Budget(macs=0.5), only_if_faster=True)
    assert torch.equal(same(X + 1), model(X + 1))
    assert forms(same) == {}
    told = [str(w.message) for w in caught]
    assert "reach macs=1 of the model, not 0.5" in told[0]
    assert "nothing was converted: 2 x not faster, 2 ms > 3 ms" in told[1]
    assert len(told) == 2


def test_a_plan_that_is_faster_is_kept_and_nothing_else_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"budget": sepconv.Budget(macs=0.5)}
    planned = forms(sepconv.convert(net(), X, **options))
    asked = plant(monkeypatch, lambda *_: True)
    assert forms(sepconv.convert(net(), X, only_if_faster=True, **options)) == planned
    assert {form for _, form in asked} == {None, *planned.values()}


def test_a_dry_run_plans_and_warns_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda out_channels, form: out_channels == 24 and form.rank != 1)
    options: dict[str, Any] = {"budget": sepconv.Budget(macs=0.3), "only_if_faster": True}
    with pytest.warns(UserWarning, match="only_if_faster"):
        plan = sepconv.convert(net(), X, dryrun=True, **options)
    with pytest.warns(UserWarning, match="only_if_faster"):
        small = sepconv.convert(net(), X, **options)
    assert {x.name: x.form for x in plan.converted} == forms(small) == {"2": Form(2)}


def test_a_budget_that_nothing_reaches_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = plant(monkeypatch, lambda *_: True)
    model = net()
    with untouched(model), pytest.raises(ValueError, match="lowest reachable"):
        sepconv.convert(
            model, X, budget=sepconv.Budget(macs=0.01), only_if_faster=True, inplace=True
        )
    assert asked == []


def test_of_equally_fast_forms_the_least_error_within_the_budget() -> None:
    costs = {
        "a": {Form(1): 10.0, Form(2): 20.0, Form(3): 30.0, DENSE: 100.0},
        "b": {Form(1): 10.0, Form(2): 20.0, Form(3): 30.0, DENSE: 100.0},
        "c": {Form(1): 10.0, DENSE: 100.0},  # whose error is not known
    }
    errors = {
        "a": {Form(1): 0.9, Form(2): 0.5, Form(3): 0.1},
        "b": {Form(1): 0.3, Form(2): 0.2, Form(3): 0.1},
    }

    def planned(fraction: float, slow: set[tuple[str, Form]]) -> dict[str, Form | None]:
        def faster(name: str, form: Form | None) -> bool:
            return form is not None and (name, form) not in slow

        budget = sepconv.Budget(macs=fraction)
        return forms_if_faster(budget, costs, errors, 300.0, faster)

    assert planned(0.5, set()) == {"a": Form(3), "b": Form(2), "c": DENSE}
    assert planned(0.5, {("b", Form(2))}) == {"a": Form(3), "b": Form(1), "c": DENSE}
    # 100 for c and 30 for a leave too little for b's only form, so the cheapest of each are taken.
    assert planned(0.45, {("b", Form(1)), ("b", Form(2)), ("a", Form(1))}) == {
        "a": Form(2),
        "b": Form(3),
        "c": DENSE,
    }
    # What nothing makes faster is left to the caller, and the others make up for it if they can.
    slow = {("b", Form(1)), ("b", Form(2)), ("b", Form(3))}
    assert planned(0.5, slow) == {"a": Form(1), "b": Form(1), "c": DENSE}
    assert planned(0.8, slow) == {"a": Form(3), "b": Form(1), "c": DENSE}


def test_a_layer_that_does_not_run_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    plant(monkeypatch, lambda *_: True)
    small = sepconv.convert(Spare().eval(), X, rank=2, only_if_faster=True)
    assert list(forms(small)) == ["used"]
    assert sepconv.report(small).layers[1].reason == "not run"
    with pytest.warns(UserWarning, match=re.escape("reach params=")):
        sepconv.convert(Spare().eval(), X, budget=sepconv.Budget(params=0.3), only_if_faster=True)


def test_a_search_does_not_warn_of_its_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda out_channels, form: out_channels == 16)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "convert: only_if_faster")
        small = sepconv.search(
            net(), X, [torch.randn(4, 8, 6, 6)], lambda _: 1.0, only_if_faster=True, steps=3
        )
    assert list(forms(small)) == ["0"]
