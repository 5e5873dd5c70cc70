"""Budgets with forms to choose from: what is chosen, what is left alone, what is refused."""

import re
from typing import Any

import pytest
import torch
from conversion.compare import untouched
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sepconv
from sepconv import Form
from sepconv.calibration.sensitivity import Sensitivity
from sepconv.factorize import weight_curve
from sepconv.factorize.curves import form_grid
from sepconv.graph import ConvSpec
from sepconv.nn import SeparableConv2d
from sepconv.reports.latency import LatencyTable

# Networks as small as these do not get faster.
pytestmark = pytest.mark.filterwarnings("ignore:convert. the model did not get faster")

X = torch.zeros(2, 3, 12, 12)


def low(conv: nn.Conv2d, rank: int) -> nn.Conv2d:
    """With a weight that reads few directions of its channels, as trained ones do."""
    with torch.no_grad():
        channels = conv.weight.shape[1]
        mixing = torch.randn(channels, rank) @ torch.randn(rank, channels) / channels
        conv.weight.copy_(torch.einsum("kcrs,cd->kdrs", conv.weight, mixing) + conv.weight / 50)
    return conv


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.ReLU(),
        low(nn.Conv2d(24, 32, 3, padding=1), 6),
        nn.ReLU(),
        low(nn.Conv2d(32, 32, 1), 8),
        nn.ReLU(),
        low(nn.Conv2d(32, 24, 3, padding=1), 10),
    ).eval()


def of_1x1() -> nn.Sequential:
    """Nine tenths of the multiply-adds are in 1x1 convolutions."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 64, 1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 1),
        nn.ReLU(),
        nn.Conv2d(64, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
    ).eval()


def forms(model: nn.Module) -> dict[str, Form]:
    """Of the layers that were converted, read off the model itself."""
    return {name: m.form for name, m in model.named_modules() if isinstance(m, SeparableConv2d)}


def macs(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(X)
    return counter.get_total_flops() // 2


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def batches(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 12, 12, generator=generator) for _ in range(2)]


# Plain ranks


def test_plain_ranks_need_nothing_of_what_forms_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked")

    monkeypatch.setattr(Sensitivity, "metrics", never)
    monkeypatch.setattr("sepconv.calibration.layers.solve_form", never)
    monkeypatch.setattr("sepconv.calibration.curves.outline", never)
    for rank in (2, Form(2), Form(9, 500, 500), "full"):
        small = sepconv.convert(net(), X, rank=rank, calibration=batches())
        assert all(form.is_plain for form in forms(small).values())
    sepconv.convert(net(), X, budget=sepconv.Budget(macs=0.5))
    with pytest.raises(AssertionError, match="asked"):
        sepconv.convert(net(), X, rank=Form(2, 6), calibration=batches())
    with pytest.raises(AssertionError, match="asked"):
        sepconv.convert(net(), X, budget=sepconv.Budget(macs=0.5), calibration=batches())


# 1x1 convolutions


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["weight", "calibrated"])
def test_they_are_split_where_a_budget_is_not_reached_without(kind: str, calibrated: bool) -> None:
    options: dict[str, Any] = {"calibration": batches()} if calibrated else {}
    model, count = of_1x1(), {"macs": macs, "params": params}[kind]
    budget = sepconv.Budget(**{kind: 0.6})
    small = sepconv.convert(model, X, budget=budget, **options)
    split = {name for name, form in forms(small).items() if name in ("1", "3", "5")}
    assert split
    assert count(small) <= 0.6 * count(model)
    with untouched(model), pytest.raises(ValueError, match="lowest reachable is") as error:
        sepconv.convert(model, X, budget=budget, pointwise=False, inplace=True, **options)
    lowest = float(re.search(r"lowest reachable is ([0-9.]+)", str(error.value)).group(1))
    assert lowest > 0.6
    without = sepconv.convert(
        model, X, budget=sepconv.Budget(**{kind: lowest}), pointwise=False, **options
    )
    assert set(forms(without)) == {"7"}
    assert count(without) <= lowest * count(model)
    within = sepconv.convert(model, X, budget=sepconv.Budget(**{kind: lowest}), **options)
    assert count(within) <= lowest * count(model)
    if calibrated:
        errors = [sepconv.report(small).output_error for small in (within, without)]
        assert errors[0] < errors[1], "1x1 are split where that costs less of the output"
    else:
        assert forms(within) == forms(without), "1x1 are left where it is reached without them"


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_out_of_reach_even_with_them_names_what_is_in_reach(kind: str) -> None:
    with pytest.raises(ValueError, match="lowest reachable is") as error:
        sepconv.convert(of_1x1(), X, budget=sepconv.Budget(**{kind: 0.001}))
    lowest = float(re.search(r"lowest reachable is ([0-9.]+)", str(error.value)).group(1))
    model = of_1x1()
    small = sepconv.convert(model, X, budget=sepconv.Budget(**{kind: lowest}))
    assert set(forms(small)) == {"1", "3", "5", "7"}
    count = {"macs": macs, "params": params}[kind]
    assert count(small) <= lowest * count(model)


def test_1x1_convolutions_are_left_where_the_rest_is_enough() -> None:
    for pointwise, expected in ((None, False), (False, False), (True, True)):
        small = sepconv.convert(net(), X, budget=sepconv.Budget(macs=0.5), pointwise=pointwise)
        assert ("4" in forms(small)) == expected


# From the weight alone


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("fraction", [0.3, 0.4, 0.5, 0.65, 0.8])
def test_forms_to_choose_from_never_make_it_worse(kind: str, fraction: float) -> None:
    count = {"macs": macs, "params": params}[kind]
    model = net()
    budget = sepconv.Budget(**{kind: fraction})
    free = sepconv.convert(model, X, budget=budget, bottleneck=True)
    plain = sepconv.convert(model, X, budget=budget, bottleneck=False)
    by_default = sepconv.convert(model, X, budget=budget)
    assert forms(by_default) == forms(plain), "without inputs"
    assert all(form.is_plain for form in forms(plain).values())
    assert count(free) <= fraction * count(model)
    assert count(plain) <= fraction * count(model)
    lost = [
        sum((layer.error or 0.0) ** 2 for layer in sepconv.report(small).converted)
        for small in (free, plain)
    ]
    assert lost[0] <= lost[1] + 1e-9
    if fraction <= 0.5:
        assert any(form.rank_in for form in forms(free).values())
        assert lost[0] < 0.8 * lost[1]


# Latency


def plant(monkeypatch: pytest.MonkeyPatch, seconds: Any, whole: float) -> list[Form | None]:
    asked: list[Form | None] = []

    def told(table: LatencyTable, spec: ConvSpec, form: Form | None) -> float:
        asked.append(form)
        return float(seconds(form))

    monkeypatch.setattr(LatencyTable, "seconds", told)
    monkeypatch.setattr(
        "sepconv.conversion.costs.take_turns", lambda forms, *_, **__: dict.fromkeys(forms, whole)
    )
    monkeypatch.setattr("sepconv.conversion.convert.confirmed", lambda plan, *_: plan)
    return asked


def test_a_latency_budget_takes_the_best_of_the_fast_forms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a table in the place of the clock, in which no rank tells how long a form takes."""

    def seconds(form: Form | None) -> float:
        if form is None:
            return 10e-3
        return (1 + (7 * form.rank + 3 * (form.rank_in or 11)) % 13) * 1e-3

    torch.manual_seed(0)
    model = low(nn.Conv2d(24, 16, 3), 6).eval()
    asked = plant(monkeypatch, seconds, 10e-3)
    x = torch.zeros(1, 24, 8, 8)
    curve = weight_curve(model.weight, form_grid((16, 24, 3, 3)))
    for limit in (0.15, 0.35, 0.55, 0.7):
        budget = sepconv.Budget(latency=limit)
        small = sepconv.convert(nn.Sequential(model), x, budget=budget, bottleneck=True)
        (form,) = forms(small).values()
        fast = {f: e for f, e in curve.items() if seconds(f) <= limit * 10e-3 + 1e-12}
        counted = {f for f in fast if f in asked}  # forms that cost most of the dense one are not
        assert curve[form] == pytest.approx(min(fast[f] for f in counted), abs=1e-12)
        assert seconds(form) <= limit * 10e-3 + 1e-12
        (layer,) = sepconv.report(small).converted
        assert (layer.latency_before, layer.latency_after) == (10e-3, seconds(form))


@pytest.mark.parametrize("faster", ["plain", "mapped"])
def test_a_latency_budget_with_calibration_goes_by_the_table(
    monkeypatch: pytest.MonkeyPatch, faster: str
) -> None:
    def seconds(form: Form | None) -> float:
        quick = form is not None and form.is_plain == (faster == "plain")
        return 4e-3 if quick else 10e-3

    plant(monkeypatch, seconds, 22e-3)
    options: dict[str, Any] = {"budget": sepconv.Budget(latency=0.6), "pointwise": False}
    small = sepconv.convert(net(), X, calibration=batches(), **options)
    assert len(forms(small)) == 2
    assert {form.is_plain for form in forms(small).values()} == {faster == "plain"}


@pytest.mark.parametrize("slow", ["plain", "mapped"])
def test_only_what_is_faster_is_kept_of_a_plan(monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    """A budget is planned again with what is; ranks that were asked for are left dense."""

    def seconds(form: Form | None) -> float:
        if form is None:
            return 1.0
        return 2.0 if form.is_plain == (slow == "plain") else 0.5

    plant(monkeypatch, seconds, 1.0)
    rank = {"2": Form(2, 6), "6": 2}
    small = sepconv.convert(net(), X, rank=rank, only_if_faster=True)
    assert set(forms(small)) == ({"2"} if slow == "plain" else {"6"})
    model = net()
    budget = sepconv.Budget(macs=0.35)
    small = sepconv.convert(model, X, budget=budget, only_if_faster=True, bottleneck=True)
    assert {form.is_plain for form in forms(small).values()} == {slow != "plain"}
    assert macs(small) <= 0.35 * macs(model)


# Dry runs


@pytest.mark.parametrize("calibrated", [False, True], ids=["weight", "calibrated"])
@pytest.mark.parametrize("model", [net, of_1x1])
def test_a_dry_run_plans_what_is_done(model: Any, calibrated: bool) -> None:
    options: dict[str, Any] = {"budget": sepconv.Budget(macs=0.5), "bottleneck": True}
    if calibrated:
        options["calibration"] = batches()
    dense = model()
    with untouched(dense):
        plan = sepconv.convert(dense, X, dryrun=True, **options)
    small = sepconv.convert(dense, X, **options)
    done = sepconv.report(small)
    planned = {layer.name: layer.form for layer in plan.layers if layer.form is not None}
    assert planned == {layer.name: layer.form for layer in done.converted} == forms(small)
    assert (plan.macs_after, plan.params_after) == (done.macs_after, done.params_after)
    assert [x.method for x in plan.layers] == [x.method for x in done.layers]
    assert any(form.rank_in for form in planned.values())


def test_a_layer_that_nothing_makes_cheaper_has_no_part_in_a_latency_budget() -> None:
    """One output channel: every form multiplies more than the dense one."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 1, 3)]
    x = torch.randn(8, 3, 24, 24)
    options: dict[str, Any] = {"budget": sepconv.Budget(latency=1.0), "calibration": [x]}
    small = sepconv.convert(nn.Sequential(*parts), x, bottleneck=False, **options)
    assert "2" not in forms(small)
